"""A network behind an interface: `Predictor` from pictures to answers, and an HTTP application around it.

What decodes, limits, queues and answers belongs here; how a network is run does not. Importing this room needs no
extra; `app`, `forms`, `metrics` and `server` need ``pip install 'skipnet-rt[serve]'``.
"""

from skipnet_rt.serving.pictures import PictureError
from skipnet_rt.serving.predictor import Prediction, Predictor, PredictorError
from skipnet_rt.serving.settings import Settings

__all__ = ["PictureError", "Prediction", "Predictor", "PredictorError", "Settings"]
