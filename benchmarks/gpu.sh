#!/usr/bin/env bash
# Everything that is measured on a GPU, in at most 8 minutes: the tests of the GPU's path on it, then tables in Markdown.
#
#     bash benchmarks/gpu.sh > benchmarks/gpu_<device>_<month>.md
#     DEVICE=cpu SMALL=1 bash benchmarks/gpu.sh        a dry run of the script anywhere; its numbers mean nothing
#
# Needs torch, lightning, timm and this folder; no network. Each part has its own limit and prints what it has by then.
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 DEVICE="${DEVICE:-cuda}"
python="${PYTHON:-python}"
small="${SMALL:+small}"

part() { # seconds, name
    timeout -k 5 "$1" "$python" benchmarks/gpu.py "$2" "device=$DEVICE" $small 2>&1
    local code=$?
    [ $code -eq 0 ] || printf '\n**%s ended early** (exit code %s; 124: its %s s were over)\n' "$2" "$code" "$1"
    echo
}

part 20 machine
echo "## Tests of the GPU's path, on $DEVICE"
echo
SLIDE_MIL_DEVICE="$DEVICE" timeout -k 5 "${TESTS_S:-75}" "$python" -m pytest -q -o addopts= -p no:cacheprovider \
    tests/mil/test_device.py 2>&1 | tail -n 15 | sed 's/^/    /'
echo
part 40 right
part 60 protocol
part 90 train
part 40 torchmil
part 35 precision
part 70 encode
part 45 slide
