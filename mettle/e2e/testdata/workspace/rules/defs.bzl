"""Rules whose outputs are not plain files: a directory, and symlinks."""

def _tree_impl(ctx):
    out = ctx.actions.declare_directory(ctx.label.name)
    ctx.actions.run_shell(
        outputs = [out],
        command = """
set -e
mkdir -p $1/a/b $1/empty
for i in 1 2 3 4 5; do echo "leaf $i" > $1/a/b/leaf$i.txt; done
echo '#!/bin/sh' > $1/a/run.sh
echo 'echo ran from the tree' >> $1/a/run.sh
chmod +x $1/a/run.sh
ln -s b/leaf1.txt $1/a/link
""",
        arguments = [out.path],
        mnemonic = "MakeTree",
    )
    return [DefaultInfo(files = depset([out]))]

make_tree = rule(implementation = _tree_impl)

def _list_tree_impl(ctx):
    out = ctx.actions.declare_file(ctx.label.name + ".txt")
    tree = ctx.file.tree
    ctx.actions.run_shell(
        inputs = [tree],
        outputs = [out],
        command = "cd $1 && { find . -type f -o -type l | sort; ./a/run.sh; cat a/link; } > $OLDPWD/$2",
        arguments = [tree.path, out.path],
        mnemonic = "ListTree",
    )
    return [DefaultInfo(files = depset([out]))]

list_tree = rule(
    implementation = _list_tree_impl,
    attrs = {"tree": attr.label(allow_single_file = True)},
)

def _link_impl(ctx):
    target = ctx.actions.declare_file(ctx.label.name + ".target")
    link = ctx.actions.declare_file(ctx.label.name + ".link")
    ctx.actions.run_shell(
        outputs = [target, link],
        command = "echo linked > $1 && ln -s $(basename $1) $2",
        arguments = [target.path, link.path],
        mnemonic = "MakeLink",
    )
    return [DefaultInfo(files = depset([target, link]))]

make_link = rule(implementation = _link_impl)
