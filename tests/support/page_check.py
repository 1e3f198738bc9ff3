"""Whether a page of `dsray report` is whole, and opens without a network."""

from html.parser import HTMLParser


class Checker(HTMLParser):
    """Every tag is closed, and nothing is loaded from elsewhere."""

    VOID = frozenset({"meta", "img", "br", "link", "line"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID or (tag == "line" and dict(attrs).get("class") == "mark"):
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe")
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(page: str) -> None:
    """Raise AssertionError where it is not."""
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert all(source.startswith("data:") for source in checker.sources), checker.sources
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
