"""Frames out of a video file, decoded by PyAV (FFmpeg): only the ones asked for, each at the moment it is on screen."""

from vtprune.evals.video.reading import STRATEGIES, Video, choose, read

__all__ = ["STRATEGIES", "Video", "choose", "read"]
