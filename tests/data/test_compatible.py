from __future__ import annotations

import pytest
import torch
from torch import nn

from explorer.data import check_compatible, load_data
from explorer.errors import DataError
from explorer.models import load_model

X, Y = torch.randn(20, 1, 8, 8), torch.arange(20) % 4


def small_model(n_outputs: int = 4, *after: nn.Module):
    module = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, n_outputs), *after
    )
    return load_model(module, torch.randn(1, 1, 8, 8))


class Samples(torch.utils.data.Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], int(self.y[index])


def test_the_demo_belongs_together():
    check_compatible(load_model("demo:fashion-resnet"), load_data("demo:fashion"))


@pytest.mark.parametrize("hold", [lambda x, y: (x, y), Samples])
def test_fitting_data_pass_and_the_model_is_left_as_it_was(hold):
    model = small_model()
    model.module.train()
    check_compatible(model, load_data(hold(X, Y), hold(X, Y), test=(X, Y)))
    assert all(child.training for child in model.module.modules())


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ("model", "train", "validation", "message"),
    [
        (
            small_model(),
            (X, Y),
            (torch.randn(5, 3, 8, 8), Y[:5]),
            r"validation inputs .*\(3, 8, 8\).*\(1, 8, 8\)",
        ),
        (small_model(), (torch.randn(5, 1, 9, 9), Y[:5]), (X, Y), r"train inputs .*\(1, 9, 9\).*\(1, 8, 8\)"),
        (small_model(3), (X, Y), (X, Y), r"label of '\w+' is 3, and the model has 3 outputs"),
        (small_model(), (X.long(), Y), (X, Y), "train inputs .*torch.int64"),
        (small_model(4, Pair()), (X, Y), (X, Y), "the model gives tuple"),
        (small_model(4, nn.Unflatten(1, (2, 2))), (X, Y), (X, Y), r"the model gives shape \(2, 2, 2\)"),
    ],
)
@pytest.mark.parametrize("hold", [lambda x, y: (x, y), Samples])
def test_data_that_do_not_fit_the_model_are_refused(model, train, validation, message, hold):
    with pytest.raises(DataError, match=message):
        check_compatible(model, load_data(hold(*train), hold(*validation)))


def test_one_wrong_label_among_many_is_found_in_tensors():
    labels = torch.zeros(5000, dtype=torch.int64)
    labels[4321] = 7
    with pytest.raises(DataError, match="label of 'data' is 7"):
        check_compatible(small_model(), load_data((torch.zeros(5000, 1, 8, 8), labels), (X, Y)))


def test_a_model_that_takes_single_samples_only_is_refused():
    class OneByOne(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 4)

        def forward(self, x):
            return self.fc(x.view(1, 64))

    model = load_model(OneByOne(), torch.randn(1, 1, 8, 8))
    with pytest.raises(DataError, match="batches of more than one sample"):
        check_compatible(model, load_data((X, Y), (X, Y)))
