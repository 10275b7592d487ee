"""``generate()`` with its keys and values on a cluster: the same text, few bytes, and workers that may go."""

from __future__ import annotations

import os
import signal
import socket
import threading

import pytest
import torch
import transformers

import attnd
import attnd.hf
from test_cluster import children_of
from test_hf import tiny

LEFT_PADDED = torch.tensor([[0, 0, 0, 5, 9, 33, 8], [12, 4, 77, 23, 6, 51, 3]])


@pytest.fixture(autouse=True)
def registered():
    transformers.logging.set_verbosity_error()
    attnd.hf.register()


def text_of(model, ids=LEFT_PADDED, tokens=40, **options):
    options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, **options}
    return model.generate(ids, attention_mask=(ids != 0).long(), **options)


def test_two_hundred_tokens_are_eagers(cluster):
    ids = LEFT_PADDED[1:]
    wanted = text_of(tiny("eager"), ids, 200)
    model = tiny("attnd")
    with attnd.hf.Cache(cluster, model.config) as cache:
        assert torch.equal(text_of(model, ids, 200, past_key_values=cache), wanted)
        assert cache.get_seq_length() == 7 + 200 - 1
        assert len(cache.sessions()) == 1 and set(cache.sessions()) <= set(cluster.sessions())
    assert not set(cluster.sessions()).intersection(cache.sessions())
    assert len(wanted[0].unique()) > 20


@pytest.mark.parametrize("changed", [{}, {"num_key_value_heads": 4}])
def test_a_padded_batch(cluster, changed):
    wanted = text_of(tiny("eager", **changed))
    model = tiny("attnd", **changed)
    with attnd.hf.Cache(cluster, model.config) as cache:
        assert torch.equal(text_of(model, past_key_values=cache), wanted)


def small_of(family):
    import families
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    def made(implementation):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(families.small(CONFIG_MAPPING[family]), attn_implementation=implementation)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=0.2)
        return model.eval()

    return made


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "mistral", "qwen3", "gpt2"])
def test_windows_caps_and_sinks(cluster, family):
    made = small_of(family)
    wanted = text_of(made("eager"), tokens=25)
    model = made("attnd")
    with attnd.hf.Cache(cluster, model.config) as cache:
        assert torch.equal(text_of(model, tokens=25, past_key_values=cache), wanted)


def test_beams_fork_and_a_conversation_goes_on(cluster):
    model, eager = tiny("attnd"), tiny("eager")
    with attnd.hf.Cache(cluster, model.config) as cache:
        got = text_of(model, tokens=20, num_beams=3, past_key_values=cache)
        assert torch.equal(got, text_of(eager, tokens=20, num_beams=3))
        assert len(cache.sessions()) == 6
    ids = LEFT_PADDED[1:]
    with attnd.hf.Cache(cluster, model.config) as cache:
        once = text_of(model, ids, 10, past_key_values=cache)
        more = torch.cat([once, torch.tensor([[44, 45]])], dim=1)
        assert torch.equal(text_of(model, more, 10, past_key_values=cache), text_of(eager, more, 10))
        cache.crop(-5)
        assert cache.get_seq_length() == 7 + 10 + 2 + 10 - 1 - 5


@torch.no_grad()
def test_attention_that_is_not_attnds_is_found_out(cluster):
    model = tiny("eager")
    with attnd.hf.Cache(cluster, model.config) as cache, pytest.raises(RuntimeError, match='load the model with "attnd"'):
        model(LEFT_PADDED[1:], past_key_values=cache)
    model = tiny("attnd")
    with attnd.hf.Cache(cluster, model.config) as cache, pytest.raises(ValueError, match="weights"):
        model(LEFT_PADDED[1:], past_key_values=cache, output_attentions=True)


class Stop(Exception):
    pass


def run_until(model, layer, ids, cache):
    """A run of the model that ends before a layer's attention."""

    def stop(*_):
        raise Stop

    hook = model.model.layers[layer].register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        model(ids, past_key_values=cache)
    hook.remove()


@torch.no_grad()
def test_a_run_that_ends_between_layers_is_found_out_and_cut(cluster):
    model, ids = tiny("attnd"), LEFT_PADDED[1:]
    wanted = tiny("eager")(ids).logits
    with attnd.hf.Cache(cluster, model.config) as cache:
        model(ids[:, :4], past_key_values=cache)
        run_until(model, 1, ids[:, 4:5], cache)
        with pytest.raises(RuntimeError, match="layer 1 has 4 tokens where layer 0 needs 5"):
            model(ids[:, 4:5], past_key_values=cache)
        # As many as all layers have.
        cache.crop(4)
        assert [layer.tokens for layer in cache.layers] == [4, 4]
        assert torch.allclose(model(ids[:, 4:], past_key_values=cache).logits, wanted[:, 4:], atol=1e-4)
    with attnd.hf.Cache(cluster, model.config) as cache:
        run_until(model, 1, ids, cache)
        with pytest.raises(RuntimeError, match="layer 0 has 8 tokens where layer 1 needs 1"):
            model(ids[:, :1], past_key_values=cache)
        cache.reset()
        assert torch.allclose(model(ids, past_key_values=cache).logits, wanted, atol=1e-4)


@torch.no_grad()
def test_sessions_that_others_change_and_steps_that_fail_break_the_cache_until_it_is_cut(cluster):
    model, ids = tiny("attnd"), LEFT_PADDED[1:]
    wanted = tiny("eager")(ids).logits
    with attnd.hf.Cache(cluster, model.config) as cache:
        model(ids[:, :4], past_key_values=cache)
        (name,) = cache.sessions()
        rows = torch.ones(2, 3, 8).numpy()
        other = cluster.attach(name)
        other.append(0, rows, rows)
        with pytest.raises((RuntimeError, attnd.Error)) as raised:
            model(ids[:, 4:5], past_key_values=cache)
        assert "tokens" in str(raised.value) or "FENCED" in str(raised.value) or "EPOCH" in str(raised.value), raised.value
        with pytest.raises(RuntimeError, match="cache.crop"):
            model(ids[:, 4:5], past_key_values=cache)
    with attnd.hf.Cache(cluster, model.config) as cache:
        model(ids[:, :4], past_key_values=cache)
        with pytest.raises(ValueError, match="layer 0 has tokens of"):
            tiny("attnd").bfloat16()(ids[:, 4:5], past_key_values=cache)
        cache.crop(4)
        nan = ids[:, 4:5]
        weights = model.model.embed_tokens.weight
        kept = weights.clone()
        weights[int(nan)] = float("nan")
        with pytest.raises(attnd.InvalidArgument, match="NON_FINITE"):
            model(nan, past_key_values=cache)
        weights.copy_(kept)
        with pytest.raises(RuntimeError, match="a step of layer 0 failed: NON_FINITE.*cache.crop"):
            model(ids[:, 4:], past_key_values=cache)
        cache.crop(4)
        assert torch.allclose(model(ids[:, 4:], past_key_values=cache).logits, wanted[:, 4:], atol=1e-4)


class Counted:
    """Connections to a cluster that count the bytes from here to there."""

    def __init__(self, url):
        host, port = url.removeprefix("http://").split(":")
        self.there = (host, int(port))
        self.bytes = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(self.there)
            for one, other, counts in ((near, far, True), (far, near, False)):
                threading.Thread(target=self.pass_on, args=(one, other, counts), daemon=True).start()

    def pass_on(self, one, other, counts):
        try:
            while data := one.recv(65536):
                self.bytes += len(data) if counts else 0
                other.sendall(data)
        except OSError:
            pass
        other.close()


class Each(transformers.LogitsProcessor):
    """Calls something after each token."""

    def __init__(self, call):
        self.call, self.count = call, 0

    def __call__(self, ids, scores):
        self.count += 1
        self.call(self.count)
        return scores


def test_bytes_of_a_token_do_not_grow_with_the_text(cluster):
    counted = Counted(cluster.url)
    model = tiny("attnd")
    at = []
    with attnd.hf.Cache(attnd.connect(counted.url), model.config) as cache:
        text_of(model, LEFT_PADDED[1:], 600, past_key_values=cache, logits_processor=[Each(lambda _: at.append(counted.bytes))])
    counted.listener.close()
    per_token = [(at[end] - at[end - 50]) / 50 for end in (60, 300, 590)]
    print(f"bytes from here to the cluster for a token of two layers, at 60, 300 and 590 tokens: {per_token}")
    # Of two layers, each with 2 heads of keys and of values and 4 of queries, of 8 numbers: 512 bytes.
    assert all(512 < number < 1400 for number in per_token), per_token
    assert per_token[2] < per_token[0] * 1.05, per_token


def test_a_worker_is_killed_and_the_text_is_the_same():
    wanted = text_of(tiny("eager"), LEFT_PADDED[1:], 120)
    model = tiny("attnd")
    with attnd.Cluster.local(workers=3, threads_per_worker=1) as cluster:
        nodes = children_of(cluster._processes.process.pid)

        def kill(count):
            if count == 60:
                for pid in nodes:
                    with open(f"/proc/{pid}/cmdline", encoding="utf-8") as line:
                        if "w1" in line.read().split("\0"):
                            os.kill(pid, signal.SIGKILL)

        with attnd.hf.Cache(cluster, model.config, replicas=2, acks=2, allow_same_host=True) as cache:
            got = text_of(model, LEFT_PADDED[1:], 120, past_key_values=cache, logits_processor=[Each(kill)])
        assert sorted(name for name, state in cluster.workers().items() if state == "ACTIVE") == ["w0", "w2"]
    assert torch.equal(got, wanted)
