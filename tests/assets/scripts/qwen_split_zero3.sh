accelerate launch examples/qwen_image/model_training/train.py \
  --dataset_base_path data/cats --dataset_metadata_path data/cats/metadata.csv --max_pixels 1048576 --dataset_repeat 1 \
  --model_id_with_origin_paths "Qwen/Qwen-Image:text_encoder/model*.safetensors,Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors" \
  --output_path "./cache/cats" --lora_base_model dit --lora_rank 32 --task "sft:data_process"

accelerate launch --config_file configs/zero3_file.yaml examples/qwen_image/model_training/train.py \
  --dataset_base_path "./cache/cats/" --dataset_repeat 40 --max_pixels 1048576 \
  --model_id_with_origin_paths "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors" \
  --learning_rate 1e-4 --num_epochs 5 \
  --output_path "./models/train/cats" --lora_base_model dit --lora_rank 32 --use_gradient_checkpointing --task "sft:train"
