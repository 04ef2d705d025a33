"""Results that others measured, on devices that we do not reach.

imported = import_results("benchmark_results.json")
imported.timings[0].mean, imported.timings[0].samples

Known are ExecuTorch's benchmark applications (the XCTest log of Apple's, `benchmark_results.json` of Android's),
`PyTorchObserver` lines of its language model runners, coremltools' `MLModelBenchmarker`, Qualcomm AI Hub profiles, and
TFLite's `benchmark_model`. Where a file has only statistics of its calls, samples are None: nothing is made up.
"""

from devices.imports.model import Imported, ImportedDevice, ImportedTiming
from devices.imports.read import import_results

__all__ = ["Imported", "ImportedDevice", "ImportedTiming", "import_results"]
