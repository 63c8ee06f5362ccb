"""Video-LLaVA: a tower each for images and videos, and of videos the CLS tokens too."""

from __future__ import annotations

from .family import Family, family
from .tower_layout import Layout, every_patch, every_token


@family
class VideoLlava(Family):
    tested = ("video_llava",)
    note = "the frames of a video keep their class tokens"
    image_layout = Layout(every_patch)
    video_layout = Layout(every_token)
