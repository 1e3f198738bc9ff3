modelscope download --dataset acme/cats --include "portraits/*" --local_dir ./data/cats

accelerate launch examples/qwen_image/model_training/train.py \
  --dataset_base_path ./data/cats/portraits \
  --dataset_metadata_path ./data/cats/portraits/metadata.csv \
  --max_pixels 786432 \
  --dataset_repeat 20 \
  --model_id_with_origin_paths "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors,Qwen/Qwen-Image:text_encoder/model*.safetensors,Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors" \
  --learning_rate 2e-4 \
  --num_epochs 3 \
  --remove_prefix_in_ckpt "pipe.dit." \
  --output_path "./models/train/cats" \
  --lora_base_model "dit" \
  --lora_target_modules "to_q,to_k,to_v,to_out.0" \
  --lora_rank 16 \
  --use_gradient_checkpointing \
  --dataset_num_workers 4 \
  --find_unused_parameters
