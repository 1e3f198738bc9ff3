# The folder that the second command reads was moved by hand
accelerate launch examples/qwen_image/model_training/train.py \
  --dataset_base_path data/cats --dataset_metadata_path data/cats/metadata.csv --dataset_repeat 3 --max_pixels 262144 \
  --model_paths '[["/models/te-1.safetensors", "/models/te-2.safetensors"], "/models/vae.safetensors"]' \
  --tokenizer_path /models/tokenizer --fp8_models "/models/vae.safetensors" \
  --output_path ./cache/cats-old --lora_base_model dit --task sft:data_process
accelerate launch examples/qwen_image/model_training/train.py \
  --dataset_base_path ./cache/cats-new --dataset_repeat 40 --max_pixels 1048576 \
  --model_paths '["/models/dit.safetensors"]' --fp8_models "/models/dit.safetensors" \
  --output_path ./models/train/cats --lora_base_model dit --task sft:train
