accelerate launch examples/qwen_image/model_training/train.py \ 
  --dataset_base_path data/cats \
  --model_id_with_origin_paths "Qwen/Qwen-Image:transformer/*.safetensors" \
  --lora_base_model dit --output_path ./out # --lora_rank 8 \
  --lora_rank 16
