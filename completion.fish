# Completion of `python prepare.py`, `train.py` and `agent_loop.py` in fish:  source completion.fish

function __autoresearch
    set -l words (commandline -opc)
    set -l script (string replace -r '.*/' '' -- $words[2])
    set -l variable _(string upper (string replace . _ -- $script))_COMPLETE
    for answer in (env $variable=fish_complete COMP_WORDS="$script $words[3..]" COMP_CWORD=(commandline -t) \
            $words[1] $words[2] 2>/dev/null)
        string match -qr '^plain,(?<value>.*)' -- $answer; and echo $value
    end
end

for python in python python3
    complete -c $python -n 'string match -qr "(prepare|train|agent_loop)\.py\$" -- (commandline -opc)[2]' -a '(__autoresearch)'
end
