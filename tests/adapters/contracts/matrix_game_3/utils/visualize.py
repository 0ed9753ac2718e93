"""Write a video with the keys that were pressed."""

import cv2


def process_video(video, path):
    cv2.VideoWriter(path)
