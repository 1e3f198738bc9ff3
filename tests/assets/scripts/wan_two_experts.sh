accelerate launch --config_file configs/zero3_offload.yaml examples/wanvideo/model_training/train.py \
  --dataset_base_path data/clips --dataset_metadata_path data/clips/metadata.csv --height 480 --width 832 --num_frames 49\
  --model_id_with_origin_paths "Wan-AI/Wan2.2-I2V-A14B:high_noise_model/*.safetensors,Wan-AI/Wan2.2-I2V-A14B:Wan2.1_VAE.pth" \
  --trainable_models dit --extra_inputs "input_image" --output_path ./models/train/high \
  --max_timestep_boundary 0.358 --min_timestep_boundary 0
# timesteps 900 to 1000

accelerate launch --config_file configs/zero3_offload.yaml examples/wanvideo/model_training/train.py \
  --dataset_base_path data/clips --dataset_metadata_path data/clips/metadata.csv --height 480 --width 832 --num_frames 49 \
  --model_id_with_origin_paths "Wan-AI/Wan2.2-I2V-A14B:low_noise_model/*.safetensors,Wan-AI/Wan2.2-I2V-A14B:Wan2.1_VAE.pth" \
  --trainable_models dit --extra_inputs "input_image" --output_path ./models/train/low \
  --max_timestep_boundary 1 --min_timestep_boundary 0.358
# timesteps 0 to 900
