# variant A - stage 1
accelerate launch examples/minimax_h3/model_training/train.py --dataset_base_path data/a --dataset_metadata_path data/a/m.csv \
  --model_id_with_origin_paths "MiniMax/MiniMax-H3:A/vae/*.safetensors" --output_path ./cache/a --lora_base_model dit --task sft:data_process
# variant B - stage 1
accelerate launch examples/minimax_h3/model_training/train.py --dataset_base_path data/b --dataset_metadata_path data/b/m.csv \
  --model_id_with_origin_paths "MiniMax/MiniMax-H3:B/vae/*.safetensors" --output_path ./cache/b --lora_base_model dit --task sft:data_process
# variant B - stage 2
accelerate launch examples/minimax_h3/model_training/train.py --dataset_base_path ./cache/b \
  --model_id_with_origin_paths "MiniMax/MiniMax-H3:B/transformer/*.safetensors" --output_path ./out/b --lora_base_model dit --task sft:train
# variant A - stage 2
accelerate launch examples/minimax_h3/model_training/train.py --dataset_base_path ./cache/a \
  --model_id_with_origin_paths "MiniMax/MiniMax-H3:A/transformer/*.safetensors" --output_path ./out/a --lora_base_model dit --task sft:train
