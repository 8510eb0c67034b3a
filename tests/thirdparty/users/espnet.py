"""Speech recognition: language model, encoder and attention decoder training, and their beam search."""

from __future__ import annotations

import torch
from espnet.nets.batch_beam_search import BatchBeamSearch
from espnet.nets.beam_search import BeamSearch
from espnet2.asr.decoder.rnn_decoder import RNNDecoder
from espnet2.asr.encoder.rnn_encoder import RNNEncoder
from espnet2.lm.seq_rnn_lm import SequentialRNNLM
from torch import Tensor

from tests.thirdparty.case import Step, case, training

WORDS, WIDTH, FRAMES = 30, 48, 20
SENTENCES = torch.arange(4 * 12).reshape(4, 12) * 7 % (WORDS - 2) + 1
LENGTHS = torch.tensor([20, 17, 9, 4])


def _language_model(kind: str, dtype: torch.dtype) -> Step:
    model = SequentialRNNLM(WORDS, unit=WIDTH, nlayers=2, rnn_type=kind)
    return training(model, lambda *states: model(SENTENCES, states if kind == "lstm" else states[0]),
                    *(torch.randn(2, 4, WIDTH) for _ in range(2 if kind == "lstm" else 1)), dtype=dtype)  # fmt: skip


@case("SequentialRNNLM, LSTM", "lstm.input")
def lm_lstm(dtype: torch.dtype) -> Step:
    return _language_model("lstm", dtype)


@case("SequentialRNNLM, GRU", "gru.input")
def lm_gru(dtype: torch.dtype) -> Step:
    return _language_model("gru", dtype)


@case("SequentialRNNLM, RNN with ReLU", "rnn_relu.input")
def lm_relu(dtype: torch.dtype) -> Step:
    return _language_model("rnn_relu", dtype)


@case("RNNEncoder, packed BLSTM with projections", "lstm.data")
def encoder(dtype: torch.dtype) -> Step:
    model = RNNEncoder(16, num_layers=2, hidden_size=WIDTH, output_size=WIDTH, subsample=(2, 1))
    return training(model, lambda x: model(x, LENGTHS), torch.randn(4, FRAMES, 16), dtype=dtype)


@case("RNNDecoder, LSTM cells with attention", "lstm_cell")
def decoder(dtype: torch.dtype) -> Step:
    model = RNNDecoder(WORDS, WIDTH, num_layers=2, hidden_size=WIDTH)
    return training(model, lambda x: model(x, LENGTHS, SENTENCES, torch.tensor([12, 10, 12, 3])),
                    torch.randn(4, FRAMES, WIDTH), dtype=dtype)  # fmt: skip


def _search(searching: type[BeamSearch], dtype: torch.dtype) -> Step:
    """The five best hypotheses: their tokens and scores."""
    # A random model prefers no word. Larger weights make it decided, so that rounding does not choose.
    lm = SequentialRNNLM(WORDS, unit=WIDTH, nlayers=2)
    ears = RNNDecoder(WORDS, WIDTH, num_layers=1, hidden_size=WIDTH)
    scorers = {"lm": lm} if searching is BatchBeamSearch else {"lm": lm, "decoder": ears}
    with torch.no_grad():
        for model in scorers.values():
            for weight in model.parameters():
                weight.mul_(3.0)
    search = searching(scorers, dict.fromkeys(scorers, 0.5), beam_size=5, vocab_size=WORDS, sos=WORDS - 1,
                       eos=WORDS - 1, pre_beam_score_key="full").to(dtype).eval()  # fmt: skip
    heard = torch.randn(FRAMES, WIDTH).to(dtype)
    # The state with which the language model begins has torch's default dtype.
    lm.zero_state = lambda: tuple(torch.zeros(2, WIDTH, dtype=dtype) for _ in range(2))

    def step() -> dict[str, Tensor]:
        with torch.no_grad():
            best = search(heard, maxlenratio=0.8)[:5]
        assert len(best) == 5
        return {"scores": torch.stack([torch.as_tensor(found.score) for found in best])} | {
            f"tokens {place}": found.yseq for place, found in enumerate(best)
        }

    return step


@case("BeamSearch, RNNDecoder and language model", "lstm.input", "lstm_cell")
def search(dtype: torch.dtype) -> Step:
    return _search(BeamSearch, dtype)


@case("BatchBeamSearch, language model", "lstm.input")
def batch_search(dtype: torch.dtype) -> Step:
    return _search(BatchBeamSearch, dtype)
