python examples/qwen_image/model_training/train.py \
  --dataset_base_path data/cats --dataset_metadata_path data/cats/metadata.csv \
  --model_id_with_origin_paths "Qwen/Qwen-Image:transformer/*.safetensors,Qwen/Qwen-Image:text_encoder/*.safetensors,Qwen/Qwen-Image:vae/*.safetensors" \
  --lora_base_model dit --output_path ./models/train/cats \
  --cpu_offload --optimize_on_cpu --param_size_threshold 250
