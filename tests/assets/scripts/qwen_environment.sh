export DIFFSYNTH_MODEL_BASE_PATH=/mnt/models
export PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"
WANDB_API_KEY=0123456789abcdef CUDA_VISIBLE_DEVICES=2,3 DIFFSYNTH_SKIP_DOWNLOAD=True \
accelerate launch my_copies/train.py \
  --dataset_base_path data/cats --dataset_metadata_path data/cats/metadata.csv \
  --model_id_with_origin_paths "Qwen/Qwen-Image:transformer/*.safetensors,Qwen/Qwen-Image:text_encoder/*.safetensors,Qwen/Qwen-Image:vae/*.safetensors" \
  --lora_base_model dit --output_path ./models/train/cats --enable_wandb_log --wandb_project cats --swanlab_project cats \
  --my_own_flag 3 --lora_rnk 8
