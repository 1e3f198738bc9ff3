accelerate launch examples/flux2/model_training/train.py \
  --dataset_base_path data/cats --dataset_metadata_path data/cats/metadata.csv --extra_inputs "template_inputs" \
  --model_id_with_origin_paths "black-forest-labs/FLUX.2-klein-base-4B:transformer/*.safetensors" \
  --template_model_id_or_path "acme/template:" --tokenizer_path "black-forest-labs/FLUX.2-klein-4B:tokenizer/" \
  --trainable_models template_model --remove_prefix_in_ckpt "pipe.template_model." --output_path ./models/train/template
