#!/usr/bin/env bash
# cluster/rayjob.sh COMMAND …     raywarp with these words, as the entrypoint of rayjob.yaml
# KubeRay (1.7) repeats a job that failed, whatever its exit code. Wrong input, exit code 2, would be
# wrong again on each new cluster. So this ends the job as stopped, which KubeRay does not repeat.
set -uo pipefail

raywarp "$@"
code=$?
if ((code == 2)); then
  job=$(python3 -c 'import json, os
print(json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"])')
  ray job stop --no-wait --address="${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}" "$job"
  sleep 60 # Ray ends this script first
fi
exit "$code"
