import pytest

from diffusers_tbcm.redaction import is_secret, redact, redact_command, redact_values


TOP = ""  # so that this file names no machine's folders


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A user and secrets that texts can name."""
    monkeypatch.setenv("USER", "alice")
    monkeypatch.setenv("HOME", f"{TOP}/home/alice smith")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("SHORT_TOKEN", "a")
    monkeypatch.setattr("os.getcwd", lambda: f"{TOP}/data/my project")


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/data/x/p.txt", "p.txt"),
        ("/data of bob/my prompts/p q.txt", "p q.txt"),
        ("--prompts_file=/data/x/p.txt", "--prompts_file=p.txt"),
        ("--prompts_file '/data of bob/p q.txt' --x 1", "--prompts_file 'p q.txt' --x 1"),
        ("'--prompts_file=/data of bob/p q.txt'", "'--prompts_file=p q.txt'"),
        ("/data/with\\ space/p.txt", "p.txt"),
        ("Trained on `/data/x/p.txt`, see (/data/x/y).", "Trained on `p.txt`, see (y)."),
        (f"![x]({TOP}/home/bob/x.png)", "![x](x.png)"),
        (f"<td>{TOP}/home/bob/x.png</td>", "<td>x.png</td>"),
        ("PATH=/a/b:/c/d", "PATH=d"),
        (f"-I{TOP}/home/alice/x", "x"),
        ("//server/share/x.txt", "x.txt"),
        (f"{TOP}/home/alice", "~"),
        (f"{TOP}/Users/bob/", "~"),
        (f"in {TOP}/home/alice smith/docs/p.txt and {TOP}/data/my project/x/y.txt.", "in p.txt and y.txt."),
        (r"C:\Users\alice smith\my p.txt", "my p.txt"),
        (r"see C:\Users\alice\p.txt now", "see p.txt now"),
        ("D:/data/x/p.txt", "p.txt"),
        (r"\\server\share\p.txt", "p.txt"),
        (r"runs\alice\p.txt", "p.txt"),
        ("~/x/p.txt", "p.txt"),
        ("~bob/x/p.txt", "p.txt"),
        (f"file://{TOP}/home/bob/my%20p.txt", "my p.txt"),
        ("see file:///data/x/p.txt now", "see p.txt now"),
        ("file:/data/x/p.txt", "p.txt"),
        ("../../secret/p.txt", "p.txt"),
        ("s3://bucket/of/somebody/p.txt", "p.txt"),
        ("smb://server/share/p.txt and x", "p.txt and x"),
        ("$HOME/x/p.txt", "p.txt"),
        ("${SCRATCH}/x/p.txt", "p.txt"),
        (r"%USERPROFILE%\x\p.txt", "p.txt"),
        ("https://x.com/?f=%2Fdata%2Fmy%20x%2Fp.txt&y=1", "https://x.com/?f=p.txt&y=1"),
        ("c:%5CUsers%5Cbob%5Cp.txt", "p.txt"),
        ("--out ../x/y", "--out y"),
        ("runs/alice/p.txt", "p.txt"),
        ("data-alice/2024/p.txt", "p.txt"),
        ("alice/prompts.txt", "prompts.txt"),
        ("alice@cluster.lan:/data/x/p.txt", "p.txt"),
        ("bob@10.0.0.1:p.txt", "p.txt"),
        ("https://alice:pass@example.com/x", "https://example.com/x"),
        ("https://hf_abcdefghijklmnop@huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("https://x.com/y?X-Amz-Signature=12ab&page=2", "https://x.com/y?X-Amz-Signature=***&page=2"),
        ("git+https://tok@github.com/a/b.git", "git+https://github.com/a/b.git"),
        ("--hub_token abcdefg1 --seed 1", "--hub_token *** --seed 1"),
        ("--hub-token=abc --seed 1", "--hub-token=*** --seed 1"),
        ("HF_TOKEN=abc AWS_SECRET_ACCESS_KEY=d python x.py", "HF_TOKEN=*** AWS_SECRET_ACCESS_KEY=*** python x.py"),
        ("Authorization: Bearer abc", "Authorization: Bearer ***"),
        ("a key 0123456789abcdef.", "a key ***."),
        ("hf_abcdefghijklmnop", "***"),
        ("ghp_abcdefghijklmnop0123", "***"),
        ("x\n-----BEGIN RSA PRIVATE KEY-----\nabc\n", "x\n***"),
    ],
)  # fmt: skip
def test_what_is_this_machines_or_secret_goes(text, public):
    assert redact(text) == public


@pytest.mark.parametrize(
    "text",
    [
        "a dog and/or a cat, 24/7, ~5/10, 1/2 or w/o", "/a dog / a cat", "</td><br/>", "alice/student-v1.5",
        "a painting by alice",
        'from_pretrained("owner/name")', "![x](images/00.png)", "data/p.txt", "./data/p.txt", "google/gemma-2-2b-it",
        "https://huggingface.co/docs/x?style=flat#y", "https://medium.com/@x/y",
        "[TBCM](https://arxiv.org/abs/2511.20410)",
        "the token is yours; `--hub_token takes it`; pad_token=<pad> max_tokens=3",
        "\\alpha\\beta {\\\"o}", "guidance 4.5: 3 steps",
        "https://img.shields.io/x?url=https%3A%2F%2Fgithub.com%2Fa%2Fb", "$x/y$ costs $5/month, 50%/60%", "",
    ],
)  # fmt: skip
def test_what_is_for_everybody_stays(text):
    assert redact(text) == text


def test_a_given_secret_goes_and_a_short_one_spoils_no_words():
    assert redact("a tokenlike word and hunter2hunter2", ["hunter2hunter2", "a", ""]) == "a tokenlike word and ***"


def test_values_and_names_of_json():
    value = {"/data/x/y": ["/a/b", 1, None, {"z": "~/q/w"}], "n": 1.5, "t": True}
    assert redact_values(value) == {"y": ["b", 1, None, {"z": "w"}], "n": 1.5, "t": True}


def test_a_command_line():
    words = [
        "--prompts_file=/a b/x y.txt",
        "--out",
        "/q w/e",
        "--prompt",
        "a dog / a cat",
        "--token",
        "t",
        "--t=C:\\x\\y",
    ]
    assert redact_command(words) == "'--prompts_file=x y.txt' --out e --prompt 'a dog / a cat' --token *** --t=y"


def test_names_of_secrets():
    secret = ("hub_token", "HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "password", "token")
    assert all(map(is_secret, secret))
    assert not any(map(is_secret, ("max_tokens", "seed", "TOKENIZERS_PARALLELISM", "monkey", "lora_target_modules")))


def test_a_home_at_the_top_and_no_home_or_working_folder_at_all(monkeypatch):
    def gone():
        raise FileNotFoundError

    monkeypatch.setenv("HOME", "/alone")
    monkeypatch.setattr("os.getcwd", gone)
    kept = "https://example.com/alone/x, data/alone and /aloneness"
    assert redact(f"{kept}; /alone and /alone/x/p.txt") == f"{kept}; ~ and p.txt"
    monkeypatch.setenv("HOME", "/")
    assert redact("/alone and / and /a/b") == "/alone and / and b"
