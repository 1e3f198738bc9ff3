accelerate launch examples/qwen_image/model_training/train.py --dataset_base_path data/cats --dataset_metadata_path data/cats/m.csv \
  --model_id_with_origin_paths "Qwen/Qwen-Image:transformer/*.safetensors,Qwen/Qwen-Image:text_encoder/*.safetensors,Qwen/Qwen-Image:vae/*.safetensors" \
  --extra_inputs "seed,rand_device,num_inference_steps,cfg_scale" --lora_base_model dit --output_path ./out --task "direct_distill"
