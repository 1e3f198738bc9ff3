accelerate launch examples/flux/model_training/train.py \
  --dataset_base_path data/pairs --dataset_metadata_path data/pairs/metadata.csv --data_file_keys "image,kontext_images" \
  --extra_inputs "kontext_images" --trainable_models dit --learning_rate 1e-5 \
  --model_id_with_origin_paths "black-forest-labs/FLUX.1-Kontext-dev:flux1-kontext-dev.safetensors,black-forest-labs/FLUX.1-dev:text_encoder/model.safetensors,black-forest-labs/FLUX.1-dev:ae.safetensors" \
  --output_path ./models/train/kontext --use_gradient_checkpointing
