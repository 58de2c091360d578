"""Where progress was reported from before the training loop needed it too: `flexure.progress`."""

from flexure.progress import Progress, ProgressReporter

__all__ = ["Progress", "ProgressReporter"]
