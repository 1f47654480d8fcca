"""The commands of ``qlora-ext``, one file each: ``add_parser`` defines the options, ``run`` executes the command."""
