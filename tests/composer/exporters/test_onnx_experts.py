"""A mixture's experts in a graph: what the router chose is computed, and nothing else is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")


def closed_form(
    rows: np.ndarray, index: np.ndarray, shares: np.ndarray, weights: list[dict[str, np.ndarray]]
) -> np.ndarray:
    """Σ shareₑ · downₑ(silu(gateₑ x) · upₑ x) over the experts of each row, float64."""
    out = np.zeros(rows.shape)
    for row, x in enumerate(rows.astype(np.float64)):
        for expert, share in zip(index[row], shares[row], strict=True):
            gate, up, down = (weights[expert][part].astype(np.float64) for part in ("w1", "w3", "w2"))
            inner = gate @ x
            out[row] += share * (down @ (inner / (1 + np.exp(-inner)) * (up @ x)))
    return out


@pytest.mark.slow
def test_experts_compute_the_rows_sent_to_them_and_read_no_other_weights(tmp_path: Path) -> None:
    """Any number of rows agrees with the closed form, although the weights of an expert that is not chosen are NaN."""
    import onnxruntime

    from composer.exporters.onnx.experts import separate_experts, translations
    from composer.exporters.onnx.skeleton import quiet

    class Stacked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.empty(4, 2 * 6, 8))

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Stacked()

        def forward(self, rows: torch.Tensor, index: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
            return self.experts(rows, index, shares)

    block = Block()
    separate_experts(block, ("w1", "w3", "w2"))
    generator = np.random.default_rng(0)
    weights = [
        {part: generator.standard_normal(shape).astype(np.float32) for part, shape in shapes}
        for shapes in [(("w1", (6, 8)), ("w3", (6, 8)), ("w2", (8, 6)))] * 4
    ]
    weights[3] = {part: np.full_like(value, np.nan) for part, value in weights[3].items()}
    for name, parameter in block.named_parameters():
        _, expert, part, _ = name.split(".")
        parameter.data = torch.from_numpy(weights[int(expert)][part])

    def example(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        index = np.stack([generator.permutation(3)[:2] for _ in range(count)]).astype(np.int64)
        return (
            generator.standard_normal((count, 8)).astype(np.float32),
            index,
            generator.random((count, 2)).astype(np.float32),
        )

    dynamic = {name: {0: "tokens"} for name in ("rows", "index", "shares")}
    with quiet():
        program = torch.onnx.export(
            block,
            kwargs={name: torch.from_numpy(value) for name, value in zip(dynamic, example(5), strict=True)},
            dynamic_shapes=dynamic,
            input_names=list(dynamic),
            dynamo=True,
            opset_version=23,
            custom_translation_table=translations(),
            verbose=False,
        )
    program.save(tmp_path / "experts.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "experts.onnx")
    for count in (1, 2, 17):
        rows, index, shares = example(count)
        got = session.run(None, {"rows": rows, "index": index, "shares": shares})[0]
        expected = closed_form(rows, index, shares, weights)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
