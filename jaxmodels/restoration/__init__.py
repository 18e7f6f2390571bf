"""Restoration of images and videos: super-resolution of compressed material (AIM 2022)."""
