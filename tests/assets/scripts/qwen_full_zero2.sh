# Full training, optimizer in host memory
accelerate launch --config_file configs/zero2_offload.yaml examples/qwen_image/model_training/train.py \
  --dataset_base_path data/cats --dataset_metadata_path data/cats/metadata.jsonl \
  --model_id_with_origin_paths "Qwen/Qwen-Image:transformer/*.safetensors,Qwen/Qwen-Image:text_encoder/*.safetensors,Qwen/Qwen-Image:vae/*.safetensors" \
  --trainable_models "dit" --learning_rate 1e-5 --num_epochs 2 \
  --output_path "./models/train/cats full" --use_gradient_checkpointing --find_unused_parameters --initialize_model_on_cpu
