#!/bin/bash
# Features of all slides by an array of jobs on SLURM, then a study. On the login node:
#
#   SLIDES=/data/slides OUT=/data/phikon PARTS=8 bash submit.sh
#   SLIDES=s3://lab/slides OUT=s3://lab/phikon COHORT=s3://lab/cohort.csv RUN=s3://lab/runs/a bash submit.sh
#
# Each job takes part i of n (shard=i/n); the parts are disjoint. Submitted again, it does what is missing.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
: "${SLIDES:?set SLIDES=FOLDER of slides}" "${OUT:?set OUT=FOLDER for features}"
export SLIDES OUT ENCODER=${ENCODER:-phikon} COHORT=${COHORT:-} RUN=${RUN:-}

# Weights are fetched once, here, where there is a network; every job then finds them in HF_HOME.
export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}
python "$here/../weights.py" "$ENCODER"

array=$(sbatch --parsable --array="1-${PARTS:-8}" "$here/extract.sbatch")
# afterany: jobs of which a slide failed end with 1; mil.train itself stops where features are missing.
[ -z "$COHORT" ] || sbatch --dependency="afterany:$array" "$here/train.sbatch"
