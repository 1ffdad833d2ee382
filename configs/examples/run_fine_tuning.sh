#!/usr/bin/env bash
# The older pipeline's script, with every setting it had. It is not run here: `student migrate` reads it.

# true: train on the teacher's logits (LOGITS_FILE). false: on conversations alone (INPUT_FILE).
USE_LOGITS=true

INPUT_FILE="conversations.json"
PROCESSED_FILE="processed_conversations.json"
LOGITS_FILE="logits.json"
PROCESSED_LOGITS_FILE="processed_logits.json"

# ce, kl or hybrid; hybrid is ALPHA times cross-entropy and BETA times KL at TEMPERATURE.
LOSS_TYPE="hybrid"
TEMPERATURE=1.0
ALPHA=0.3
BETA=0.7

if [ "$USE_LOGITS" = true ]; then
    python preprocess.py --input "$LOGITS_FILE" --output "$PROCESSED_LOGITS_FILE"
else
    python preprocess.py --input "$INPUT_FILE" --output "$PROCESSED_FILE"
fi

# Writes the model to sft_output/final and one line a step to training_log.log.
python fine_tune.py \
    --use_logits "$USE_LOGITS" \
    --input_file "$PROCESSED_FILE" \
    --logits_file "$PROCESSED_LOGITS_FILE" \
    --loss_type "$LOSS_TYPE" \
    --temperature "$TEMPERATURE" \
    --alpha "$ALPHA" \
    --beta "$BETA" \
    --log_level INFO
