# Completion of `python prepare.py`, `train.py` and `agent_loop.py` in bash and zsh:  source completion.sh
# click does not complete arguments of `python`, so this function calls the script for its completions.

_autoresearch() {
    local script="${COMP_WORDS[1]##*/}" kind value
    COMPREPLY=()
    case "$COMP_CWORD $script" in
    1\ *) return ;;
    *\ prepare.py | *\ train.py | *\ agent_loop.py) ;;
    *) return ;;
    esac
    while IFS=, read -r kind value; do
        [ "$kind" = plain ] && COMPREPLY+=("$value")
    done < <(env COMP_WORDS="$script ${COMP_WORDS[*]:2}" COMP_CWORD=$((COMP_CWORD - 1)) \
        "_$(echo "${script%.py}" | tr a-z A-Z)_PY_COMPLETE=bash_complete" "${COMP_WORDS[0]}" "${COMP_WORDS[1]}" 2>/dev/null)
}

if [ -n "$ZSH_VERSION" ]; then
    autoload -U +X compinit bashcompinit && compinit -u && bashcompinit
fi
complete -o default -F _autoresearch python python3
