accelerate launch examples/qwen_image/model_training/train.py --dataset_base_path ./cache/elsewhere --lora_base_model dit \
  --model_id_with_origin_paths "Qwen/Qwen-Image:transformer/*.safetensors" --output_path ./out/one --task sft:train
accelerate launch examples/wanvideo/model_training/train.py --dataset_base_path data/clips --lora_base_model dit \
  --model_id_with_origin_paths "Wan-AI/Wan2.1-T2V-1.3B:Wan2.1_VAE.pth" --output_path ./cache/clips --task sft:data_process
