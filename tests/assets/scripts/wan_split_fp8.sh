accelerate launch examples/wanvideo/model_training/train.py \
  --dataset_base_path data/clips --dataset_metadata_path data/clips/metadata.csv --height 480 --width 832 --num_frames 49 \
  --model_id_with_origin_paths "Wan-AI/Wan2.1-I2V-14B-480P:diffusion_pytorch_model*.safetensors,Wan-AI/Wan2.1-I2V-14B-480P:Wan2.1_VAE.pth" \
  --fp8_models "Wan-AI/Wan2.1-I2V-14B-480P:Wan2.1_VAE.pth" \
  --offload_models "Wan-AI/Wan2.1-I2V-14B-480P:diffusion_pytorch_model*.safetensors" \
  --extra_inputs "input_image" --output_path ./cache/clips --lora_base_model dit --lora_target_modules "q,k,v,o" \
  --use_gradient_checkpointing_offload --task "sft:data_process"

accelerate launch examples/wanvideo/model_training/train.py \
  --dataset_base_path ./cache/clips --height 480 --width 832 --dataset_repeat 100 \
  --model_id_with_origin_paths "Wan-AI/Wan2.1-I2V-14B-480P:diffusion_pytorch_model*.safetensors,Wan-AI/Wan2.1-I2V-14B-480P:Wan2.1_VAE.pth" \
  --fp8_models "Wan-AI/Wan2.1-I2V-14B-480P:diffusion_pytorch_model*.safetensors" \
  --offload_models "Wan-AI/Wan2.1-I2V-14B-480P:Wan2.1_VAE.pth" \
  --extra_inputs "input_image" --output_path ./models/train/clips --lora_base_model dit --lora_target_modules "q,k,v,o" \
  --use_gradient_checkpointing_offload --task "sft:train"
