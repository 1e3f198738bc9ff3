"""Metadata files of every kind, good and bad."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from diffsynth_ray.data.metadata import Metadata, read_metadata
from diffsynth_ray.errors import DataError

REPOSITORY = Path(__file__).parents[3]
DATASET = REPOSITORY / "tests" / "assets" / "dataset"
PHOTOS = REPOSITORY / "jobs" / "data" / "photos"

Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file beside a.png and b.png."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / name)

    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


def read(path: Path, *keys: str, required_columns: tuple[str, ...] = ()) -> Metadata:
    return read_metadata(path.parent, path, keys or ("image", "video"), required_columns=required_columns)


def message_of(path: Path, *keys: str, required_columns: tuple[str, ...] = ()) -> str:
    with pytest.raises(DataError) as caught:
        read(path, *keys, required_columns=required_columns)
    return str(caught.value)


def test_csv_json_jsonl_and_parquet_are_the_same_data(tmp_path: Path) -> None:
    rows = json.loads((DATASET / "metadata.json").read_text())
    parquet = tmp_path / "metadata.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    paths = [*(DATASET / f"metadata.{kind}" for kind in ("csv", "json", "jsonl")), parquet]
    found = [read_metadata(DATASET, path) for path in paths]
    assert all(metadata.rows == rows for metadata in found)
    assert len({metadata.digest for metadata in found}) == 1
    assert found[0].columns == ("image", "prompt")
    assert found[0].file_columns == ("image",)
    assert len(found[0]) == 4
    assert found[0].files(0, "image") == [str(DATASET / "images" / "0.png")]


def test_the_shipped_photographs_are_good() -> None:
    assert len(read_metadata(PHOTOS, PHOTOS / "metadata.csv", required_columns=("prompt",))) == 5


def test_a_base_path_may_be_a_file_url() -> None:
    metadata = read_metadata(DATASET.as_uri(), (DATASET / "metadata.csv").as_uri())
    assert Path(metadata.files(3, "image")[0]).is_file()
    with pytest.raises(DataError, match=r"hdfs://host/data: must be a local path, file:// or s3://"):
        read_metadata("hdfs://host/data", DATASET / "metadata.csv")


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_csv_of_spreadsheets(write: Write, start: bytes, newline: str) -> None:
    text = 'image,prompt\na.png,"two lines,\nand a ""quote"""\n\nb.png,\n'.replace("\n", newline)
    metadata = read(write("m.csv", start + text.encode()))
    assert metadata.columns == ("image", "prompt")
    assert metadata.rows == [
        {"image": "a.png", "prompt": f'two lines,{newline}and a "quote"'},
        {"image": "b.png", "prompt": ""},
    ]


def test_what_is_empty_is_the_empty_string(write: Write, tmp_path: Path) -> None:
    text = '[{"image": "a.png", "prompt": null, "seed": 3}, {"image": "b.png", "prompt": NaN}]'
    expected = [{"image": "a.png", "prompt": "", "seed": 3}, {"image": "b.png", "prompt": "", "seed": ""}]
    assert read(write("m.json", text)).rows == expected
    table = pyarrow.table({"image": ["a.png"], "prompt": pyarrow.array([None], pyarrow.string()), "x": [float("nan")]})
    pyarrow.parquet.write_table(table, tmp_path / "m.parquet")
    assert read(tmp_path / "m.parquet").rows == [{"image": "a.png", "prompt": "", "x": ""}]


def test_lists_of_files(write: Write) -> None:
    keys = ("image", "edit_image")
    rows = [{"image": "a.png", "edit_image": ["a.png", "b.png"], "prompt": "[x]"}]
    assert read(write("m.json", json.dumps(rows)), *keys).rows == rows
    metadata = read(write("m.csv", 'image,edit_image,prompt\na.png,"[""a.png"", ""b.png""]",[x]\n'), *keys)
    assert metadata.rows == rows
    assert len(metadata.files(0, "edit_image")) == 2
    assert metadata.digest == read(write("m.jsonl", json.dumps(rows[0])), *keys).digest


def test_which_of_an_image_and_a_video_is_trained_on_is_told(write: Write) -> None:
    path = write("m.csv", "image,video,prompt\na.png,b.png,x\nb.png,b.png,y\n,b.png,z\n")
    assert "2 rows have both 'image', 'video': trains on 'image'" in read(path).notes[0]
    assert "trains on 'video'" in read(path, "video", "image").notes[0]
    assert read(path, "video").notes == ()
    assert read(write("m.csv", "image,video,prompt\na.png,,x\n,b.png,y\n")).notes == ()


def test_urls_are_not_looked_for(write: Write) -> None:
    metadata = read(write("m.csv", "video,prompt\nhttps://example.org/v.mp4?x=1.2,text\n"))
    assert metadata.files(0, "video") == ["https://example.org/v.mp4?x=1.2"]


def test_the_digest_is_of_the_content(write: Write) -> None:
    one, same = write("1.csv", "image,prompt\na.png,x\n"), write("2.csv", "prompt,image\r\nx,a.png\r\n")
    other = write("3.csv", "image,prompt\na.png,y\n")
    assert read(one).digest == read(same).digest != read(other).digest


def test_a_folder_with_captions(write: Write, tmp_path: Path) -> None:
    write("a.txt", "\ufeffa caption\n")
    write("notes.txt", "not a caption")
    metadata = read_metadata(tmp_path, None)
    assert metadata.rows == [{"image": "a.png", "prompt": "a caption"}, {"image": "b.png", "prompt": ""}]
    assert "2 images" in metadata.notes[0]
    assert "1 with a caption" in metadata.notes[0]


def test_a_folder_of_images_and_clips_takes_the_columns_asked_for() -> None:
    videos = REPOSITORY / "tests" / "assets" / "dataset" / "videos"
    metadata = read_metadata(videos, None, ("video",))
    assert [row["video"] for row in metadata.rows] == ["g.gif", "v.mp4"]
    with pytest.raises(DataError, match="no images or videos"):
        read_metadata(videos, None, ("image",))


def test_a_forgotten_metadata_path_is_an_error() -> None:
    with pytest.raises(DataError, match=r"metadata_path is not set, but .* set it to .*metadata\.csv"):
        read_metadata(DATASET, None)
    with pytest.raises(DataError, match="both unset"):
        read_metadata("", None)


def test_names_what_is_near_a_missing_metadata_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file .*metdata\.csv; did you mean .*metadata\.csv\?"):
        read_metadata(DATASET, DATASET / "metdata.csv")
    with pytest.raises(DataError, match=r"did you mean .*assets/dataset/metadata\.csv"):
        read_metadata(DATASET, "metadata.csv")
    with pytest.raises(DataError, match="not a directory"):
        read_metadata(tmp_path / "nowhere", DATASET / "metadata.csv")


def test_a_missing_column_lists_the_present_ones(write: Write) -> None:
    path = write("m.csv", "image,Promt\na.png,x\n")
    message = message_of(path, required_columns=("prompt",))
    assert "no column 'prompt'; did you mean 'Promt'?" in message
    assert "columns present: 'image', 'Promt'" in message
    assert "no column 'edit_image'" in message_of(path, "image", "edit_image")
    assert "'video' (dataset.data_file_keys)" in message_of(path, "video")
    assert "semicolons" in message_of(write("s.csv", "image;prompt\na.png;x\n"))


def test_lists_all_rows_with_problems(write: Write) -> None:
    lines = ["image,prompt", "a.png,x", ",no file", '"quoted\nname.png",x', "b.tiff,x", '"[""a.png"",]",x']
    message = message_of(write("m.csv", "\n".join(lines)))
    assert "m.csv: 4 problem(s) in 5 rows" in message
    assert "m.csv:3: no file, 'image' is empty" in message
    assert "m.csv:4: 'image' no such file" in message
    assert "m.csv:6: 'image' has an unknown extension: b.tiff; known are avi, bmp" in message
    assert "m.csv:7: 'image' is not a JSON array of files" in message


def test_many_problems_are_cut_and_counted(write: Write) -> None:
    message = message_of(write("m.csv", "image\n" + "".join(f"{i}.png\n" for i in range(50)) + "a.png\n"))
    assert "50 problem(s) in 51 rows" in message
    assert "... and 40 more" in message
    assert message.count("no such file") == 10


def test_asks_about_the_base_path_when_no_file_exists(write: Write) -> None:
    assert "none of the 2 files exists; is dataset.base_path" in message_of(write("m.csv", "image\nx.png\ny.png\n"))


def test_files_are_not_looked_for_on_request(write: Write) -> None:
    path = write("m.csv", "image\nx.png\n")
    assert len(read_metadata(path.parent, path, check_files=False)) == 1


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("m.csv", "", "m.csv: the file is empty"),
        ("m.csv", "image,prompt\n", "m.csv: there are no rows"),
        ("m.csv", "image,prompt\na.png,x,y\nb.png\n", "m.csv:2: 3 cells, the header has 2"),
        ("m.csv", "image,prompt\na.png,x\nb.png\n", "m.csv:3: 1 cells, the header has 2"),
        ("m.csv", "image,prompt\na.png,x\nb.png\n", "an empty cell has its comma too"),
        ("m.csv", 'image,prompt\na.png,"x\n', "m.csv:2: unexpected end of data; inside"),
        (
            "m.csv",
            'image,prompt\na.png,"x\nb.png,y\nb.png,z\n',
            "m.csv:4: unexpected end of data in the row that begins at line 2",
        ),
        ("m.csv", f"image,prompt\n{'[' * 9999}],x\n", "m.csv:2: 'image' is not a JSON array of files"),
        ("m.json", f'[{{"image": "a.png", "prompt": {"9" * 5000}}}]', "m.json: JSON that cannot be read: Exceeds the limit"),
        ("m.json", "[" * 9999, "m.json: JSON that cannot be read: maximum recursion depth"),
        ("m.jsonl", "{}\n" + "[" * 9999, "m.jsonl:2: JSON that cannot be read (maximum recursion depth"),
        ("m.csv", "image,image\na.png,b.png\n", "the header names 'image' twice"),
        ("m.csv", b"image,prompt\na.png,caf\xe9\n", "m.csv: not UTF-8"),
        ("m.json", '{"image": "a.png"}', "must be a list of objects, got dict"),
        (
            "m.json",
            '{"image": "a.png"}\n{"image": "b.png"}',
            "m.json:2: not JSON: Extra data (column 1); one object a line",
        ),
        ("m.json", '[{"image": "a.png"}, 3]', "m.json, row 2: must be an object, got 3"),
        ("m.json", '[{"image": 3}]', "m.json, row 1: 'image' must be a path or a list of paths, got 3"),
        ("m.json", '[{"image": ["a.png", null]}]', "must be a path or a list of paths"),
        ("m.json", '[{"image": "a\\u0000.png", "prompt": "x"}]', "m.json, row 1: 'image' no such file"),
        ("m.json", '[{"image": "\\ud800.png", "prompt": "x"}]', "m.json, row 1: 'image' no such file"),
        (
            "m.json",
            '[{"image": "a.png", "prompt": ["a cat", "a dog"]}]',
            'm.json, row 1: \'prompt\' must be text, got ["a cat", "a dog"]',
        ),
        ("m.json", '[{"image": "a.png", "prompt": {"en": "a cat"}}]', '\'prompt\' must be text, got {"en": "a cat"}'),
        ("m.json", '[{"image": "a.png", "prompt": true}]', "'prompt' must be text, got true"),
        ("m.jsonl", '{"image": "a.png", "prompt": "x\\ud800"}\n', "m.jsonl:1: 'prompt' has half a character"),
        ("m.jsonl", '{"image": "a.png"}\n\n{"image": \n[]\n', "m.jsonl:3: not JSON: Expecting value"),
        ("m.jsonl", '{"image": "a.png"}\n{"image": \n[]\n', "m.jsonl:3: must be an object, got []"),
        ("m.jsonl", "\n", "there are no rows"),
        ("m.parquet", "PAR1 not really", "not a Parquet file"),
        ("m.xlsx", "x", "unknown kind of metadata file '.xlsx'; known are .csv, .json, .jsonl, .parquet"),
    ],
)
def test_a_bad_file_is_explained(write: Write, name: str, content: str | bytes, expected: str) -> None:
    assert expected in message_of(write(name, content))
