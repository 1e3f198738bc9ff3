for seed in 1 2; do
  torchrun --standalone --nproc-per-node=4 examples/qwen_image/model_training/train.py --dataset_base_path "data/$(hostname)" \
    --dataset_metadata_path data/cats/m.csv --model_id_with_origin_paths "Qwen/Qwen-Image:transformer/*.safetensors" \
    --lora_base_model dit --output_path "./out/$RUN"
done
