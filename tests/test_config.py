import re
import tomllib
from pathlib import Path

import pytest

from volseg.config import Config, load, parse_set, resolve
from volseg.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"


def test_the_commented_default_is_the_default():
    assert load(CONFIGS / "default.toml") == Config()


def test_the_commented_default_names_every_setting():
    text = (CONFIGS / "default.toml").read_text()
    for name, section in Config.model_fields.items():
        assert f"[{name}]" in text
        for key in section.annotation.model_fields:
            assert re.search(rf"^(# )?\[*({name}\.)?{key}\b", text, re.M), f"{name}.{key}"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.toml")), ids=lambda path: path.name)
def test_every_config_is_valid_and_found_by_its_name(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = path.relative_to(CONFIGS).with_suffix("").as_posix()
    assert load(name) == load(path)
    assert path.read_text().startswith("# ")


def test_a_file_of_the_users_own_goes_before_a_config_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "touching").write_text("[stitch]\nseed = 0.77\n")
    assert load("touching").stitch.seed == 0.77


def test_configs_are_in_the_wheel_where_they_are_looked_for():
    project = tomllib.loads((CONFIGS.parent / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {"configs": "volseg/configs"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kind": "slurm"}, "kind 'slurm' needs workers, or maximum"),
        ({"kind": "slurm", "workers": 2, "scheduler": "tcp://host:1"}, "kind 'slurm' starts a scheduler"),
        ({"kind": "address"}, "kind 'address' needs scheduler"),
        ({"kind": "scheduler-file"}, "kind 'scheduler-file' needs scheduler"),
        ({"options": {"queue": "gpu"}}, "kind 'local' takes no options"),
        ({"kind": "ssh", "options": {"hosts": ["head"]}}, "kind 'ssh' needs options.hosts"),
        ({"scheduler": "tcp://host:1", "maximum": 4}, "leave out minimum and maximum"),
        ({"minimum": 4, "maximum": 2}, "minimum 4 is above maximum 2"),
        ({"kind": "slrum"}, "input should be 'local', 'address'"),
    ],
)
def test_a_kind_of_cluster_that_lacks_something_says_what(given, said):
    with pytest.raises(UserError, match=re.escape(said)):
        load(base={"cluster": given})


def test_later_layers_win(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[stitch]\nseed = 0.7\nmin_voxels = 9\n")
    base = {"stitch": {"seed": 0.65, "keep_unseeded": True}}
    found = load(file, ["stitch.seed=0.8"], base=base).stitch
    assert (found.seed, found.min_voxels, found.keep_unseeded) == (0.8, 9, True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[stitch]\nsede = 1\n", r"run\.toml: unknown key 'stitch\.sede'; did you mean 'seed'"),
        ("[stich]\nseed = 1\n", r"run\.toml: unknown key 'stich'; did you mean 'stitch'"),
        ("[predict]\nqqqq = 1\n", r"unknown key 'predict\.qqqq'; known here: model, outputs"),
        ("[predict]\ntile = 'big'\n", r"run\.toml: predict\.tile = 'big': input should be a valid integer"),
        ("[stitch]\nseed = 1.5\n", r"run\.toml: stitch\.seed = 1\.5: input should be less than or equal to 1"),
        ("[predict]\nbackend = 'tpu'\n", r"predict\.backend = 'tpu': input should be 'auto', 'openvino'"),
        ("[[train.data]]\nimage = 'a'\nlable = 'b'\n", r"unknown key 'train\.data\.0\.lable'; did you mean 'label'"),
        ("[[train.data]]\nimage = 'a'\n", r"needs image and label"),
        ("[predict]\ntile = 64\noverlap = 40\n", r"overlap 40 is more than half of a tile of 64"),
        ("[fragments]\nsmooth = [4, 0, 0]\n", r"fragments\.smooth\.0 = 4: input should be less than or equal to 3"),
        ("[fragments]\ndistance = 4\ndistance_nm = 20\n", r"distance and distance_nm are one thing in two units"),
        ("[fragments]\nheight = 'distance'\n", r"height 'distance' needs a distance to count up to"),
        ("stitch = \n", r"run\.toml is not valid TOML"),
    ],
)
def test_a_wrong_key_or_value_is_refused_with_file_key_and_advice(tmp_path, text, said):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        load(file)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read config file .*absent.*or a name that volseg config lists"):
        load(tmp_path / "absent.toml")


def test_a_set_without_a_value_is_refused():
    with pytest.raises(UserError, match=r"section\.key=value"):
        parse_set("stitch.seed")


def test_a_set_names_itself_when_it_is_wrong():
    with pytest.raises(UserError, match=r"--set stitch\.seed=high: stitch\.seed = 'high'"):
        load(sets=["stitch.seed=high"])


@pytest.mark.parametrize("name", ["0", "00", "8_8_30", "1.0", "1e3", "0x10", "true", "2024-01-01", "s0", "inf"])
def test_a_name_that_looks_like_a_number_is_that_name(name):
    assert load(sets=[f"input.dataset={name}"]).input.dataset == name
    assert load(sets=[f"input.dataset='{name}'"]).input.dataset == name
    assert load({"input": {"dataset": 0}}).input.dataset == "0"


def test_settings_that_belong_together_are_checked_together():
    assert load(sets=["predict.tile=64", "predict.overlap=16"]).predict.overlap == 16
    with pytest.raises(
        UserError, match=r"--set predict\.tile=64: predict: overlap 64 is more than half of a tile of 64"
    ):
        load(sets=["predict.tile=64"])


def test_settings_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        resolve().stitch.seed = 0.1


def test_a_low_seed_level_that_is_not_lower_is_refused():
    assert load(sets=["stitch.seed=0.5", "stitch.seed_low=0.4"]).stitch.seed_low == 0.4
    with pytest.raises(UserError, match=r"seed_low 0.5 is not below seed 0.5; lower it, or set it to 0"):
        load(sets=["stitch.seed=0.5", "stitch.seed_low=0.5"])


def test_two_seed_levels_need_all_edges():
    with pytest.raises(UserError, match="seed_low needs all edges in one process"):
        load(sets=["stitch.reduce=tree", "stitch.seed_low=0.3"])


@pytest.mark.parametrize(("key", "new"), [("unlabelled", "unlabeled"), ("unlabelled_sections", "unlabeled_sections")])
def test_a_renamed_key_is_told(key, new):
    data = {"image": "em.tif", "label": "labels.tif", key: 3}
    with pytest.raises(UserError, match=rf"train\.data\.0\.{key}' is called '{new}' now"):
        resolve(("test", {"train": {"data": [data]}}))


def test_the_name_of_a_level_may_be_a_number():
    assert load(sets=["input.dataset=1"]).input.dataset == "1"


def test_a_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert load(sets=["predict.model=~/model.safetensors"]).predict.model == "/home/me/model.safetensors"


def test_a_path_may_name_the_users_home_or_be_a_file_url(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.toml").write_text('[train]\nout = "~/out"\nstart = "file:///models/a.safetensors"\n')
    for place in ("~/my.toml", f"file://{tmp_path}/my.toml"):
        settings = load(place)
        assert settings.train.out == f"{tmp_path}/out"
        assert settings.train.start == "/models/a.safetensors"
