"""Who finds faces and their landmarks in photographs: dlib, MTCNN, SCRFD."""

from faceless.detectors.base import Detector, Faces
from faceless.detectors.dlib_hog import Dlib
from faceless.detectors.mtcnn import MTCNN
from faceless.detectors.scrfd import SCRFD

__all__ = ["MTCNN", "SCRFD", "Detector", "Dlib", "Faces"]
