accelerate launch --multi_gpu --num_processes 4 --mixed_precision bf16 examples/qwen_image/model_training/train.py \
  --dataset_base_path data/cats --dataset_metadata_path data/cats/metadata.csv \
  --model_id_with_origin_paths "Qwen/Qwen-Image:transformer/*.safetensors,Qwen/Qwen-Image:text_encoder/*.safetensors,Qwen/Qwen-Image:vae/*.safetensors" \
  --trainable_models "dit,text_encoder" --output_path ./models/train/cats --gradient_accumulation_steps 4 --save_steps 1000 \
  --customized_optimizer torch.optim.Adam --weight_decay 0.0 --enable_csv_log
