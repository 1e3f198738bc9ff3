accelerate launch --config_file configs/eight_gpus.yaml examples/flux/model_training/train.py \
  --dataset_base_path data/cats --dataset_metadata_path data/cats/metadata.csv \
  --model_paths '[
    "models/FLUX.1-dev/flux1-dev.safetensors",
    "models/FLUX.1-dev/text_encoder/model.safetensors",
    ["models/FLUX.1-dev/text_encoder_2/model-1.safetensors", "models/FLUX.1-dev/text_encoder_2/model-2.safetensors"],
    "models/FLUX.1-dev/ae.safetensors"
  ]' \
  --tokenizer_1_path models/FLUX.1-dev/tokenizer --tokenizer_2_path models/FLUX.1-dev/tokenizer_2 \
  --embedded_guidance 3.5 --lora_base_model dit --lora_target_modules "to_qkv_mlp,a_to_qkv" \
  --output_path ./models/train/flux --align_to_opensource_format --use_gradient_checkpointing
