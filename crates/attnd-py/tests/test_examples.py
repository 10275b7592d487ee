"""The examples run, show what they say, and leave pictures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples/python"


def run(name, folder, *arguments):
    done = subprocess.run([sys.executable, EXAMPLES / f"{name}.py", *arguments], cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "wrote " in done.stdout
    (written,) = re.findall(r"wrote (\S+?)(?::|\s|$)", done.stdout)
    assert (folder / written).stat().st_size > 500
    return done.stdout


def number(pattern, text):
    found = re.search(pattern, text)
    assert found, (pattern, text)
    return float(found.group(1))


def test_every_example_has_a_test():
    here = Path(__file__).read_text(encoding="utf-8")
    names = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    assert len(names) == 5 and all(f'run("{name}"' in here for name in names), names


def test_encoder_sentence(tmp_path):
    told = run("encoder_sentence", tmp_path)
    assert number(r"context is within (\S+)", told) < 1e-5
    assert "208 tokens, 12 heads; from 'rope'" in told
    refused = subprocess.run([sys.executable, EXAMPLES / "encoder_sentence.py", "zebra"], capture_output=True, text=True)
    assert refused.returncode == 1 and "'zebra' is no token" in refused.stderr


def test_encoder_decoder_alignment(tmp_path):
    told = run("encoder_decoder_alignment", tmp_path)
    assert number(r"largest weight for (\d+)%", told) >= 95
    assert number(r"of 20 steps: (\d+)%", told) >= 90


def test_image_patches(tmp_path):
    told = run("image_patches", tmp_path)
    shares = re.findall(r"(\d+) patches of 196, (\d+)% of", told)
    assert len(shares) == 3 and sum(int(patches) for patches, _ in shares) == 196
    for patches, share in shares:
        # By chance it would be the texture's part of the image.
        assert int(share) > 90 > 100 * int(patches) / 196


def test_speech_window(tmp_path):
    told = run("speech_window", tmp_path)
    assert number(r"the same within (\S+)", told) < 1e-6
    own, by_chance = re.search(r"(\d+)% of the attention is on frames of the same vowel, which (\d+)%", told).groups()
    assert int(own) > int(by_chance) + 20
    assert number(r"frames look (\S+) frames away", told) < 25


def test_graph_neighbours(tmp_path):
    told = run("graph_neighbours", tmp_path)
    assert "78 friendships, 34 members" in told
    assert number(r"members; (\d+) are placed", told) >= 32
    assert number(r"doesn't know: (\S+);", told) == 0
