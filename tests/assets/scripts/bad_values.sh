accelerate launch examples/qwen_image/model_training/train.py --dataset_base_path data/cats --dataset_metadata_path data/cats/m.csv \
  --learning_rate fast --num_epochs 2.5 --model_paths "['single.safetensors']" --use_gradient_checkpointing yes --lora_rank \
  --lora_base_model dit --output_path two words
