accelerate launch examples/ltx2/model_training/train.py \
  --dataset_base_path data/clips --dataset_metadata_path data/clips/metadata.csv --data_file_keys "video,input_audio" \
  --model_id_with_origin_paths "Lightricks/LTX-2:ltx-2-19b-dev.safetensors" --extra_inputs "input_audio" \
  --lora_base_model dit --output_path ./models/train/ltx
