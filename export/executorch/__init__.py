"""ExecuTorch: lowering to XNNPACK in two profiles, and Python runners for what it writes.

* `stock`: runs in ExecuTorch's own multimodal runner, which Android and iOS applications embed.
* `scheduled`: drops tokens inside the language model too; `runner.ScheduledRunner` shows how to drive it.

Models that read image and text apart (CLIP, SigLIP, BLIP) have no profiles: `encoders`, driven by
`export.encoder_runner.EncoderRunner`.
"""
