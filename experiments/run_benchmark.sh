#!/usr/bin/env bash
# Start a vLLM server, benchmark it, stop it: experiments/run_benchmark.sh MODEL [flags of fuel-ray benchmark]
#   VLLM="vllm"  PORT=8000  VLLM_CACHE_BLOCK_SIZE=16  VLLM_FLAGS="--max-num-seqs 128"  START_TIMEOUT_S=600
#   GPU_MONITOR_INTERVAL=0.05  RESULT_DIR=benchmark_results
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,4s/^# *//p' "$0" >&2; exit 2; }
model=$1; shift
port=${PORT:-8000}
results=${RESULT_DIR:-benchmark_results}
mkdir -p "$results"
log=$results/vllm-$port.log

block=()
[ -z "${VLLM_CACHE_BLOCK_SIZE:-}" ] || block=(--block-size "$VLLM_CACHE_BLOCK_SIZE")
# shellcheck disable=SC2086  # VLLM and VLLM_FLAGS hold several words
env -u VLLM_CACHE_BLOCK_SIZE setsid ${VLLM:-vllm} serve "$model" --host 127.0.0.1 --port "$port" \
    --shutdown-timeout 10 "${block[@]}" ${VLLM_FLAGS:-} >"$log" 2>&1 &
server=$!
stop() {  # its whole process group: vLLM leaves children behind
    kill -TERM "$server" 2>/dev/null || true
    for _ in $(seq 200); do kill -0 "$server" 2>/dev/null || break; sleep 0.1; done
    kill -KILL -- "-$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

echo "waiting for vLLM on port $port (log: $log)"
deadline=$((SECONDS + ${START_TIMEOUT_S:-600}))
until "${PYTHON:-python3}" -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$port/health', timeout=2)" 2>/dev/null; do
    kill -0 "$server" 2>/dev/null || { echo "vLLM did not start: $(grep -E 'Error|error:' "$log" | tail -1)" >&2; exit 1; }
    [ $SECONDS -lt $deadline ] || { echo "vLLM does not answer; see $log" >&2; exit 1; }
    sleep 1
done

"${PYTHON:-python3}" -m fuel_ray benchmark --model "$model" --port "$port" \
    --gpu-monitor-interval "${GPU_MONITOR_INTERVAL:-0.05}" --monitor-cpu --enable-kv-trace \
    --save-result --result-dir "$results" "$@"
