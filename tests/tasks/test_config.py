"""Settings: unknown and contradictory ones are refused at the door, and a saved run reads back equal."""

from pathlib import Path

import pytest

from foveate.errors import ConfigError
from foveate.tasks.config import (
    DataConfig,
    FitConfig,
    SplitConfig,
    TrainConfig,
    TreeConfig,
    config_from_dict,
    config_to_dict,
    load_config,
    parse_bytes,
    save_config,
)

YAML = """
data:
  root: somewhere
  classes: {vessel: ">=128", disc: "#ff00ff", other: [3, 4], last: 7}
  spacing: [0.5, 1]
tree: {detail: {residual: 1, tv: 0.5}}
model: {overrides: {depth: 3, decoder: token, out_blocks: [1, 2], rope: true}}
train: {lr: 1e-4, augment: 0.5}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return path


def test_file_and_overrides(file: Path) -> None:
    config = load_config(file, ["train.lr=1", "--tree.max_leaves=null", "tree.tolerance=3", "data.split.seed=4"])
    assert (config.train.lr, config.tree.max_leaves, config.tree.tolerance, config.data.split.seed) == (
        1.0,
        None,
        3.0,
        4,
    )
    assert config.data.classes == {"vessel": ">=128", "disc": "#ff00ff", "other": [3, 4], "last": 7}
    assert config.data.class_names == ("background", "vessel", "disc", "other", "last")
    assert config.data.num_classes == 5
    assert config.data.spacing == (0.5, 1.0)
    assert config.tree.detail == {"residual": 1.0, "tv": 0.5}
    assert config.model.overrides == {"depth": 3, "decoder": "token", "out_blocks": [1, 2], "rope": True}


def test_text_stays_text(file: Path) -> None:
    config = load_config(file, ["out=02", "data.classes.new=#00ff00", "data.images=[ab]*.png", "data.masks={stem}.png"])
    assert (config.out, config.data.images, config.data.masks) == ("02", "[ab]*.png", "{stem}.png")
    assert config.data.classes["new"] == "#00ff00"


def test_lists_and_groups_by_override(file: Path) -> None:
    config = load_config(file, ["model.overrides.out_blocks=[0,5]", "model.overrides.depth=7", "data.classes={a: 3}"])
    assert config.model.overrides["out_blocks"] == [0, 5]
    assert config.model.overrides["depth"] == 7
    assert config.model.overrides["decoder"] == "token"
    assert config.data.classes == {"a": 3}


@pytest.mark.parametrize("word", ["false", "False", "no", "0"])
def test_cli_false_is_false(file: Path, word: str) -> None:
    config = load_config(file, [f"--train.augment={word}"])
    assert config.train.augment is False or config.train.augment == 0
    assert config.train.strength == 0
    assert load_config(file, ["--model.overrides.rope=false"]).model.overrides["rope"] is False


def test_saved_settings_read_back_equal(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["train.augment=false", "train.class_weights=[1,2,3,4,5]"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert config_from_dict(config_to_dict(config)) == config


def test_defaults_need_no_file_content(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml") == FitConfig()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("train.lrr=1", "train.lrr is not a setting: did you mean train.lr?"),
        ("trian.lr=1", "trian is not a setting: did you mean train?"),
        ("max_leaves=1", "max_leaves is not a setting: did you mean tree.max_leaves?"),
        ("train.lr", "train.lr has no value: write train.lr=VALUE"),
        ("train.lr=abc", "train.lr=abc has the wrong type: give float"),
        ("train.epochs=1.5", "train.epochs=1.5 has the wrong type: give int, null"),
        ("train.seed=true", "train.seed=True has the wrong type: give int"),
        ("data=3", "data='3' is not a group of settings: write NAME: VALUE lines"),
        ("tree.max_leaves=0", "tree.max_leaves=0 is below 1: give at least 1 leaf"),
        ("tree.max_leaves=null", "tree.max_leaves and tree.tolerance are both null: give a number of leaves"),
        ("tree.max_size=24", "tree.max_size=24 is not min_size=8 doubled a whole number of times: give 32"),
        ("train.precision=bf61", "train.precision='bf61' is none of auto, fp32, bf16, fp16: did you mean 'bf16'?"),
        ("train.augment=7", "train.augment=7.0 is outside 0 to 1: give true, false or a share"),
        ("train.class_weights=[1,2]", "train.class_weights has 2 values for 5 classes"),
        ("data.split.test=0.5", "sum to 1.35: give shares from 0 to 1 that sum to 1"),
        ("data.split.group_regex=a", "data.split.group_regex is set but data.split.by='file': set by='group'"),
        ("data.mpp=0", "data.mpp=0.0 is not a pixel size: give um per pixel, such as 0.5, or null"),
        ("data.windows=0", "data.windows=0 is below 1: give samples per image and epoch"),
        ("data.whole=2", "data.whole=2.0 is outside 0 to 1: give a share"),
        ("data.balance=-1", "data.balance=-1.0 is outside 0 to 1: give a share"),
        ("data.whole=0.5", "data.whole=0.5 asks for windows but data.window is null: give the side of a window"),
        ("data.broken=skipp", "data.broken='skipp' is none of raise, fill, skip: did you mean 'skip'?"),
        ("tree.tissue=-1", "tree.tissue=-1.0 is not a weight: give 0 (off) or more"),
        ("data.classes={}", "data.classes is empty: name at least one class"),
        ("data.mean=[0.5]", "data.mean and data.std need normalise='fixed' but it is 'image'"),
        ("data.normalise=fixed", "data.normalise='fixed' has 0 means, 0 stds for 3 channels: give one each"),
        ("data.cache=lots", "'lots' is not a size in bytes: write a number or text such as '500MB' or '2GiB'"),
        ("data.spacing=[0,1]", "data.spacing=[0.0, 1.0] must be 2 or 3 sizes in mm above 0"),
        ("model.overrides.num_classes=3", "is set by the data: change data.channels or data.classes instead"),
    ],
)
def test_config_rejects_unknown_and_inconsistent(file: Path, option: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, [option])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_key_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("tree: {max_leafs: 3}\n")
    with pytest.raises(ConfigError, match=r"tree\.max_leafs is not a setting: did you mean tree\.max_leaves\?"):
        load_config(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a: [", "is not YAML: mend it"), (b"\xff\xfe", "cannot be read as a settings file"), (b"- 3", "not settings")],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give an existing YAML file"):
        load_config(tmp_path / "none.yaml")


def test_python_settings_are_checked_too() -> None:
    with pytest.raises(ConfigError, match="leaves nothing to learn from"):
        SplitConfig(train=0.0, val=0.5, test=0.5)
    with pytest.raises(ConfigError, match=r"train\.epochs, train\.max_steps and train\.minutes are all null"):
        TrainConfig(epochs=None)
    assert TreeConfig(uniform=16).uniform == 16
    assert DataConfig(classes={"background": 0, "cell": 1}).class_names == ("background", "cell")


def test_the_share_of_whole_images_follows_the_window() -> None:
    assert DataConfig().share_whole == 1
    assert DataConfig(window=64).share_whole == 0
    assert DataConfig(window=64, whole=0.3).share_whole == 0.3


@pytest.mark.parametrize(("text", "value"), [(5, 5), ("5", 5), ("2kB", 2000), ("1.5 GiB", 3 * 2**29), ("3m", None)])
def test_parse_bytes(text: int | str, value: int | None) -> None:
    if value is None:
        with pytest.raises(ConfigError):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == value
