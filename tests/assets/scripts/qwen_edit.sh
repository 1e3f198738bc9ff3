accelerate launch examples/qwen_image/model_training/train.py \
  --dataset_base_path data/edits --dataset_metadata_path data/edits/metadata.json --data_file_keys "image,edit_image" \
  --extra_inputs "edit_image" \
  --model_id_with_origin_paths "Qwen/Qwen-Image-Edit-2511:transformer/*.safetensors,Qwen/Qwen-Image:text_encoder/*.safetensors,Qwen/Qwen-Image:vae/*.safetensors" \
  --lora_base_model dit --output_path ./models/train/edits --use_gradient_checkpointing \
  --zero_cond_t # this model alone needs it

# The same without pictures to edit:
# accelerate launch examples/qwen_image/model_training/train.py \
#   --dataset_base_path data/cats --lora_base_model dit
