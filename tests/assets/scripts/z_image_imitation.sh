accelerate launch examples/z_image/model_training/train.py --dataset_base_path data/cats --dataset_metadata_path data/cats/m.csv \
  --model_id_with_origin_paths "Tongyi-MAI/Z-Image-Turbo:transformer/*.safetensors" \
  --output_path ./models/train/z --lora_base_model dit --task trajectory_imitation
