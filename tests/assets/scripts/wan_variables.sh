#!/usr/bin/env bash
set -euo pipefail
cd "${STUDIO:-/opt/studio}"
export TOKENIZERS_PARALLELISM=false
DATA=data/clips          # where the clips are
OUT="$DATA/out"
SIZE=(--height 480 --width 832)
SIZE+=(
  --num_frames 33   # two seconds
)
EXTRA="--use_gradient_checkpointing --dataset_num_workers 2"
mkdir -p "$OUT" && nohup accelerate launch --num_processes 2 examples/wanvideo/model_training/train.py \
  --dataset_base_path "$DATA" --dataset_metadata_path "${DATA}/meta data.csv" "${SIZE[@]}" $EXTRA \
  --model_id_with_origin_paths "Wan-AI/Wan2.1-T2V-1.3B:diffusion_pytorch_model*.safetensors,Wan-AI/Wan2.1-T2V-1.3B:Wan2.1_VAE.pth" \
  --lora_base_model dit --output_path "$OUT" > train.log 2>&1 &
