"""Every method, through the whole path, against hand calculation.

Two clients with quadratic losses of unequal curvature a_i, optimum b_i, examples n_i and local
steps t_i, coordinate by coordinate. One SGD step with rate e takes y - b to (1 - e a)(y - b), so t
steps give D_i = x - y_i = c_i (x - b_i) with c_i = 1 - (1 - e a_i)^t_i: all that follows is linear.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedinit.results import RunFolder

A = np.array([[1.0, 2.0], [3.0, 0.5]])  # curvature of each client, by coordinate
B = np.array([[3.0, -1.0], [-1.0, 2.0]])  # optimum
N = np.array([4, 12])
P = (N / N.sum())[:, None]
X0 = np.array([0.7, -0.4])
RATE, MU, EPOCHS, BATCH = 0.1, 0.5, 2, 4
STEPS = EPOCHS * N // BATCH  # 2 and 6 local steps
SERVER_RATE, BETA, BETAS, EPS = 0.3, 0.8, (0.7, 0.95), 0.05

SETTINGS = {
    "dataset": "plugged_in:quadratics",
    "dataset_args": {"curvature": A.tolist(), "optimum": B.tolist(), "examples": N.tolist()},
    "model": "plugged_in:Point",
    "loss": "plugged_in:half_squared_error",
    "initialization": "start.safetensors",
    "client": {"lr": RATE, "epochs": EPOCHS, "batch_size": BATCH, "mu": MU},
    "server": {"lr": SERVER_RATE, "momentum": BETA, "betas": list(BETAS), "eps": EPS},
    "cohort": 2,
    "workers": 2,
}


@pytest.fixture
def outcome(experiment, fedinit, ray_started, tmp_path):
    """Run an experiment file and return each run's final x."""

    def run(**settings) -> dict[str, np.ndarray]:
        save_file({"x": torch.tensor(X0)}, tmp_path / "start.safetensors")
        file = experiment(SETTINGS | settings)
        result = fedinit("run", file, "--out", tmp_path / "out")
        assert result.exit_code == 0, result.output
        finals = sorted(Path(tmp_path / "out").glob("*/final.safetensors"))
        return {each.parent.name: load_file(each)["x"].numpy() for each in finals}

    return run


def gradients(x: np.ndarray) -> np.ndarray:
    return A * (x - B)


def contraction(rate: float, curvature: np.ndarray, steps: np.ndarray) -> np.ndarray:
    return 1 - (1 - rate * curvature) ** steps[:, None]


def optimum() -> np.ndarray:
    """The minimum of the weighted global loss: sum p a b / sum p a."""
    return (P * A * B).sum(0) / (P * A).sum(0)


class ServerByHand:
    """The server optimizers as their papers state them, on plain numbers."""

    def __init__(self, name: str) -> None:
        self.name, self.t = name, 0
        self.m = self.v = np.zeros(2)

    def refreshed(self, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        b1, b2 = BETAS
        if self.name == "momentum":
            return BETA * self.m + d, self.v
        if self.name == "adam":
            return b1 * self.m + (1 - b1) * d, b2 * self.v + (1 - b2) * d**2
        if self.name == "adagrad":
            return self.m, self.v + d**2
        if self.name == "yogi":
            new = self.v - (1 - b2) * d**2 * np.sign(self.v - d**2)
            return b1 * self.m + (1 - b1) * d, new
        return self.m, self.v

    def direction(self, d: np.ndarray) -> np.ndarray:
        """The step over the rate that the coming step would take on gradient d; state untouched."""
        (m, v), t = self.refreshed(d), self.t + 1
        if self.name == "sgd":
            return d
        if self.name == "momentum":
            return m
        if self.name == "adagrad":
            return d / (np.sqrt(v) + EPS)
        return (m / (1 - BETAS[0] ** t)) / (np.sqrt(v / (1 - BETAS[1] ** t)) + EPS)

    def refresh(self, d: np.ndarray) -> None:
        self.m, self.v = self.refreshed(d)
        self.t += 1

    def step(self, d: np.ndarray) -> np.ndarray:
        direction = self.direction(d)
        self.refresh(d)
        return SERVER_RATE * direction


def one_round(client: str, server: ServerByHand, x: np.ndarray) -> np.ndarray:
    """The closed form of one round of a method, from x."""
    if client == "mimelite":
        y = np.stack([x, x])
        for k in range(STEPS.max()):
            for i in np.flatnonzero(k < STEPS):
                y[i] = y[i] - RATE * server.direction(A[i] * (y[i] - B[i]))
        server.refresh((P * gradients(x)).sum(0))
        return x - SERVER_RATE * (P * (x - y)).sum(0)
    if client == "gd":
        return x - server.step((P * gradients(x)).sum(0))
    if client == "sgd":
        updates = contraction(RATE, A, STEPS) * (x - B)
        return x - server.step((P * updates).sum(0))
    # proximal: y contracts by 1 - rate (a + mu) to (a b + mu x) / (a + mu)
    updates = contraction(RATE, A + MU, STEPS) * A / (A + MU) * (x - B)
    if client == "proximal":
        return x - server.step((P * updates).sum(0))
    # nova with the proximal term: a_i = sum_k (1 - rate mu)^k over its local steps
    norms = ((1 - (1 - RATE * MU) ** STEPS) / (RATE * MU))[:, None]
    return x - server.step((P * norms).sum() * (P * updates / norms).sum(0))


CLIENTS = ["sgd", "gd", "proximal", "nova", "mimelite"]
SERVERS = ["sgd", "momentum", "adam", "adagrad", "yogi"]


AS_ONE = pytest.mark.parametrize("as_one", [{}, {"together": 2, "workers": 1}], ids=str)


@AS_ONE
def test_every_method_takes_three_rounds_as_calculated_by_hand(outcome, as_one):
    """25 methods from one file: each client's closed form, each server's formula, three rounds."""
    ends = outcome(
        rounds=3, grid={"client.optimizer": CLIENTS, "server.optimizer": SERVERS}, **as_one
    )
    assert len(ends) == 25
    for client in CLIENTS:
        for name in SERVERS:
            server, x = ServerByHand(name), X0
            for _ in range(3):
                x = one_round(client, server, x)
            end = ends[f"client.optimizer={client},server.optimizer={name}"]
            assert end == pytest.approx(x, abs=1e-9), (client, name)


def test_fixed_points(outcome):
    """FedAvg ends at sum p c b / sum p c, which is not the optimum; FedSGD and FedNova at it.

    For a small rate e, c_i = e t_i a_i + O(e^2): FedAvg weights clients by their steps. FedNova
    divides by t_i, so its fixed point is the optimum up to O(e); here e t a < 2e-7. The server rate
    makes up for e: 1 / (e t_eff) takes the step of gradient descent with rate 1/2 or so.
    """
    small, effective = 1e-8, float((P[:, 0] * STEPS).sum())
    ends = outcome(
        rounds=60,
        client=SETTINGS["client"] | {"mu": 0.0},
        server={"optimizer": "sgd", "lr": 0.4},
        grid={"client.optimizer": ["sgd", "gd", "nova"]},
        when=[
            {"match": {"client.optimizer": "sgd"}, "set": {"server.lr": 1.0}},
            {
                "match": {"client.optimizer": "nova"},
                "set": {"client.lr": small, "server.lr": 0.4 / (small * effective)},
            },
        ],
    )
    c = contraction(RATE, A, STEPS)
    biased = (P * c * B).sum(0) / (P * c).sum(0)
    assert np.abs(biased - optimum()).min() > 0.05
    assert ends["client.optimizer=sgd"] == pytest.approx(biased, abs=1e-6)
    assert ends["client.optimizer=gd"] == pytest.approx(optimum(), abs=1e-6)
    assert ends["client.optimizer=nova"] == pytest.approx(optimum(), abs=1e-6)


def test_mimelite_at_one_full_batch_step_is_momentum_sgd(outcome):
    """y_i = x - e (b m + g_i), so x - D is SGD with momentum on the global loss, rate e.

    Heavy ball on a quadratic of curvature h, started at rest: with z = x - optimum,
    m <- b m + h z, z <- z - e m: the powers of [[b, h], [-e b, 1 - e h]].
    """
    rounds = 7
    ends = outcome(
        rounds=rounds,
        client={"optimizer": "mimelite", "lr": RATE, "batch_size": 100},
        server={"optimizer": "momentum", "momentum": BETA, "lr": 1.0},
    )
    (end,) = ends.values()
    for k, h in enumerate((P * A).sum(0)):
        step = np.array([[BETA, h], [-RATE * BETA, 1 - RATE * h]])
        _, z = np.linalg.matrix_power(step, rounds) @ [0.0, X0[k] - optimum()[k]]
        assert end[k] == pytest.approx(optimum()[k] + z, abs=1e-6)


@AS_ONE
def test_local_momentum_clipping_and_stragglers(outcome, as_one):
    """Local momentum, a bound on the gradient norm, and epochs drawn for stragglers.

    momentum r: a_i of FedNova is [t - r (1 - r^t) / (1 - r)] / (1 - r); with a rate of 1e-8 the
    gradient is constant along the path, so D_i = e a_i g_i and nova's D = e t_eff sum p g.
    clipping: at distance R the gradient is cut to norm G, and one step has length e G.
    stragglers: with fraction 1 and epochs [3, 3] every client does 3 epochs, not 2.
    """
    r, small, bound = 0.6, 1e-8, 0.25
    ends = outcome(
        rounds=1,
        client=SETTINGS["client"] | {"mu": 0.0},
        server={"optimizer": "sgd", "lr": 1.0},
        **as_one,
        grid={"seed": [0, 1, 2]},
        when=[
            {
                "match": {"seed": 0},
                "set": {
                    "client.optimizer": "nova",
                    "client.momentum": r,
                    "client.lr": small,
                    "server.lr": 1 / small,
                },
            },
            {
                "match": {"seed": 1},
                "set": {"client.max_grad_norm": bound, "client.epochs": 1, "client.batch_size": 99},
            },
            {
                "match": {"seed": 2},
                "set": {"stragglers.fraction": 1.0, "stragglers.epochs": [3, 3]},
            },
        ],
    )
    norms = (STEPS - r * (1 - r**STEPS) / (1 - r)) / (1 - r)
    effective = (P[:, 0] * norms).sum()
    assert ends["seed=0"] == pytest.approx(X0 - effective * (P * gradients(X0)).sum(0), abs=1e-5)

    g = gradients(X0)
    clipped = g * (bound / np.linalg.norm(g, axis=1))[:, None]
    assert np.linalg.norm(g, axis=1).min() > bound
    assert ends["seed=1"] == pytest.approx(X0 - RATE * (P * clipped).sum(0), abs=1e-6)

    updates = contraction(RATE, A, 3 * N // BATCH) * (X0 - B)
    assert ends["seed=2"] == pytest.approx(X0 - (P * updates).sum(0), abs=1e-9)


def test_rounds_hold_what_the_clients_did(outcome, tmp_path):
    """One full-batch gd round: D_i = g_i, so every number of the line is known.

    Q / ||S||^2 with S = g_1 + g_2; the cosine of the two; ||sum p g||; the loss at x; and in round
    two the cosine of the two aggregates H z and H (I - s H) z with H the weighted curvature.
    """
    rate = 0.1
    outcome(
        rounds=2,
        evaluate_every=2,
        client={"optimizer": "gd"},
        server={"optimizer": "sgd", "lr": rate},
    )
    start, first, second = RunFolder(tmp_path / "out" / "experiment").rounds
    losses = (A * (X0 - B) ** 2).sum(1) / 2
    assert start["round"] == 0
    assert start["test_loss"] == pytest.approx((P[:, 0] * losses).sum())
    assert start["test_accuracy"] is None
    g = gradients(X0)
    norms = np.linalg.norm(g, axis=1)
    mean = (P * g).sum(0)
    assert first["train_loss"] == pytest.approx((P[:, 0] * losses).sum())
    assert first["cohort_size"] == 2
    assert first["examples"] == 16
    assert first["update_norm"] == pytest.approx(np.linalg.norm(mean))
    assert first["gradient_diversity"] == pytest.approx((norms**2).sum() / (g.sum(0) ** 2).sum())
    assert first["mean_pairwise_cosine"] == pytest.approx(g[0] @ g[1] / norms.prod())
    assert first["cosine_with_previous"] is None
    assert first["test_loss"] is None
    after = mean * (1 - rate * (P * A).sum(0))
    expected = mean @ after / np.linalg.norm(mean) / np.linalg.norm(after)
    assert second["cosine_with_previous"] == pytest.approx(expected)
    x = X0 - rate * (mean + after)
    expected_loss = (P[:, 0] * (A * (x - B) ** 2).sum(1) / 2).sum()
    assert second["test_loss"] == pytest.approx(expected_loss)
    assert second["wall_seconds"] > 0


def test_the_train_loss_is_of_the_points_that_were_visited(finals):
    """f(x) = x from 0 at rate 1/2, three batches of one row: losses 0, -1/2, -1, mean -1/2."""
    settings = FROM_ZERO | {
        "dataset_args": {"curvature": [[1.0]], "optimum": [[0.0]], "examples": [3]},
        "model": "plugged_in:Itself",
        "loss": "plugged_in:first_output",
        "client": {"lr": 0.5, "batch_size": 1},
        "cohort": 1,
        "rounds": 1,
    }
    [folder] = finals(settings).values()
    assert RunFolder(folder).rounds[1]["train_loss"] == pytest.approx(-0.5)
    assert RunFolder(folder).weights["x"].item() == pytest.approx(-1.5)


FROM_ZERO = SETTINGS | {"initialization": "random", "server": {"lr": 1.0}}  # Point starts at 0


def test_the_hessian_of_an_initialization_is_measured(finals):
    """Clients of 1 and 3 examples with curvature (1, 3) and (2, 5): their mean is (1.75, 4.5)."""
    data = {"curvature": [[1.0, 3.0], [2.0, 5.0]], "optimum": [[0.0, 0.0]] * 2, "examples": [1, 3]}
    folders = finals(FROM_ZERO | {"dataset_args": data, "rounds": 0, "measure": {"hessian": 100}})
    [folder] = folders.values()
    [line] = RunFolder(folder).rounds
    assert line["hessian_algebraic"] == pytest.approx(4.5, abs=1e-9)
    assert line["hessian_absolute"] == pytest.approx(4.5, abs=1e-9)
    assert line["hessian_algebraic_residual"] < 1e-6
    assert RunFolder(folder).weights["x"].tolist() == [0, 0]


def test_the_distance_to_the_final_point_is_measured(finals):
    """One client with curvature 1 and optimum 1, rate 1/2: x_t = 1 - 2^-t in both coordinates."""
    data = {"curvature": [[1.0, 1.0]], "optimum": [[1.0, 1.0]], "examples": [4]}
    settings = FROM_ZERO | {
        "dataset_args": data,
        "client": {"lr": 0.5, "batch_size": 4},
        "cohort": 1,
        "rounds": 3,
        "evaluate_every": 2,
        "measure": {"distance": True},
    }
    [folder] = finals(settings).values()
    expected = {t: 2**0.5 * (2.0**-t - 2.0**-3) for t in (0, 2, 3)}
    assert RunFolder(folder).distances == pytest.approx(expected)


def test_float_buffers_take_the_weighted_mean(finals):
    """Clients of 1 and 3 examples that saw 1 and 2: (1 + 3 * 2) / 4. One test row, two clients."""
    data = {
        "curvature": [[1.0, 1.0], [2.0, 2.0]],
        "optimum": [[0.0, 0.0]] * 2,
        "examples": [1, 3],
        "test_optimum": [0.0, 0.0],
    }
    settings = FROM_ZERO | {"dataset_args": data, "model": "plugged_in:PointWithMemory"}
    grid = {"reduce": ["worker", "client"]}
    for folder in finals(settings | {"rounds": 1, "grid": grid}).values():
        assert RunFolder(folder).weights["seen"].item() == pytest.approx(1.75, abs=1e-12)


def test_mimelite_with_base_sgd_is_fedavg(finals):
    """Its full-batch gradient at x leaves no trace: not in running statistics, not in dropout."""
    models = ["batch_norm_classifier", "dropout_classifier"]
    settings = {
        "dataset": "plugged_in:gaussians",
        "client": {"lr": 0.1, "batch_size": 10},
        "cohort": 4,
        "rounds": 2,
        "workers": 2,
        "grid": {
            "model": [f"plugged_in:{model}" for model in models],
            "client.optimizer": ["sgd", "mimelite"],
        },
    }
    runs = finals(settings)
    for model in models:
        sgd, mimelite = (
            RunFolder(runs[f"model=plugged_in_{model},client.optimizer={each}"]).weights
            for each in ("sgd", "mimelite")
        )
        for name, value in sgd.items():
            assert torch.allclose(mimelite[name], value, rtol=0, atol=1e-6), name


def test_a_bound_on_the_gradients_norm_holds_for_full_batches_too(finals):
    """gd at 0 with g = -(3, 4): bounded to norm 1 it is -(0.6, 0.8), so x = (0.6, 0.8)."""
    data = {"curvature": [[1.0, 1.0]], "optimum": [[3.0, 4.0]], "examples": [4]}
    client = {"optimizer": "gd", "batch_size": 3, "max_grad_norm": 1.0}
    settings = FROM_ZERO | {"dataset_args": data, "client": client, "cohort": 1, "rounds": 1}
    [folder] = finals(settings).values()
    assert RunFolder(folder).weights["x"].tolist() == pytest.approx([0.6, 0.8], abs=1e-5)
