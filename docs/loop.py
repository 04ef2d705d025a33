"""Profile a device, prune to half of its milliseconds, export, and time what was exported: python docs/loop.py [DEVICE]"""

import subprocess
import sys

import comp_edge
import devices
from comp_edge.checkpoint import load_dense, load_processor
from comp_edge.tasks import load_task

MODEL, TASK = "llava-digits", "digit_vqa"
address = sys.argv[1] if len(sys.argv) > 1 else "host"  # or ssh://user@board, adb://SERIAL

with devices.connect(address) as device:
    profile = devices.profile(device, MODEL, out="profile.json")  # goes on where it was stopped
cost = devices.DeviceCost(profile, decode_tokens=4)
print("left out one by one:", cost.model.report()["whole"])

model, processor = load_dense(MODEL), load_processor(MODEL)
budget = comp_edge.Budget(speedup=2.0, cost=cost)  # or latency_ms=1.5
task = load_task(TASK, processor, model)
result = comp_edge.prune(model, task, budget=budget, strategy="probe", out="pruned", processor=processor, base=MODEL)
print("measured against predicted ms:", result.metrics["measured"])

for command in (["export.executorch", "pruned", "-o", "bundle"], ["devices", "run", "bundle/scheduled", "--device", address]):
    subprocess.run([sys.executable, "-m", *command], check=True)
