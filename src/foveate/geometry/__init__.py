"""Boxes, detail, trees and patches: no learning, no files."""
