"""What the comparisons with peers print, and where they record it."""

import datetime
import os
import pathlib
import re
import subprocess

LINES = []


def say(text=""):
    print(text, flush=True)
    LINES.append(text)


def table(title, note, columns, rows):
    say(f"### {title}\n")
    if note:
        say(f"{note}\n")
    say("| " + " | ".join(columns) + " |")
    say("|" + "---|" * len(columns))
    for row in rows:
        say("| " + " | ".join(row) + " |")
    say()


def cpu_info(field):
    path = pathlib.Path("/proc/cpuinfo")
    found = re.search(rf"^{field}\s*: (.*)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1] if found else ""


def memory_gib():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def record(folder, name, suffix, what):
    """Appends what was said to the record of this day and machine."""
    now = datetime.datetime.now()
    words = re.sub(r"\((R|TM)\)|@.*|\b(CPU|Processor)\b", "", name)
    slug = "-".join(re.findall(r"[a-z0-9]+", words.lower()))
    path = folder / f"{now:%Y-%m-%d}-{slug}-{suffix}-peers.md"
    head = "" if path.exists() else f"# {now:%Y-%m-%d}: {what} beside its peers, {words.strip()}\n"
    with path.open("a") as file:
        file.write(head + f"\n## {now:%Y-%m-%d %H:%M}\n\n" + "\n".join(LINES).rstrip() + "\n")
    print(f"recorded in {path}")
