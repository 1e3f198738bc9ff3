# Two trainings; the second stands on the first
accelerate launch examples/qwen_image/model_training/train.py \
  --dataset_base_path data/plain --dataset_metadata_path data/plain/metadata.csv \
  --model_id_with_origin_paths "Qwen/Qwen-Image:transformer/*.safetensors,Qwen/Qwen-Image:text_encoder/*.safetensors,Qwen/Qwen-Image:vae/*.safetensors" \
  --output_path ./models/train/plain --lora_base_model dit --lora_target_modules ""

accelerate launch examples/qwen_image/model_training/train.py \
  --dataset_base_path data/sharp --dataset_metadata_path data/sharp/metadata.csv \
  --model_id_with_origin_paths "Qwen/Qwen-Image:transformer/*.safetensors,Qwen/Qwen-Image:text_encoder/*.safetensors,Qwen/Qwen-Image:vae/*.safetensors" \
  --output_path ./models/train/sharp --lora_base_model dit --lora_target_modules "" \
  --preset_lora_path ./models/train/plain/epoch-0.safetensors --preset_lora_model dit
