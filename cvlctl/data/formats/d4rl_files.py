"""Sizes and sha256 of D4RL's files. D4RL publishes none; these were recorded by TensorFlow Datasets (Apache 2.0).

They are facts about the server's files: the newest entries of tensorflow_datasets/d4rl/*/checksums.tsv. Most of the Gym
files of version 2 were replaced on the server once; copies of the older ones are about.
"""

from __future__ import annotations

from typing import NamedTuple


class Known(NamedTuple):
    bytes: int
    sha256: str


_FILES = {
    "hopper-random-v1": (95_536_011, "1887aaf27bf631787013a59966e06b323ee42594aa9d9974af44301d118ce4d7"),
    "hopper-medium-v1": (96_497_748, "0e5037ccacd4bc8e8b60b1b853cf574e34fa1a74457892351ee96020b6bf7ace"),
    "hopper-expert-v1": (97_718_262, "531847c2f131addefa016b3000b409a0bb2afb50cb4ffe82639be8b08f78f837"),
    "hopper-medium-replay-v1": (58_349_502, "f807f18983c09c8d9d275e9e82aa0a17aa8649c6e29ebd3e3e3c110f25fcfbfa"),
    "hopper-full-replay-v1": (192_222_683, "7f02bb267d455e20b1f0153a189ed9df3bfcb08ea8af6d5aeb58303b2a2d5345"),
    "hopper-medium-expert-v1": (193_560_687, "bd1ee06588ac7a055fce256cb41aadd67fc6f566ed22a76a47b479439856c5a4"),
    "walker2d-random-v1": (138_787_195, "82135416af2ce85527ad513e2c055d07e4e40f6288b19b24921d52daf6c86232"),
    "walker2d-medium-v1": (151_232_470, "66bc9e18acedae54301256fba5257cbf35a605a84adbf688d1bc67ce62526d53"),
    "walker2d-expert-v1": (150_010_029, "db9fa2c2777687a964cfec6c3c7e8b1c35bd2d5813ea760439fa957db4fe0e91"),
    "walker2d-medium-replay-v1": (88_471_563, "dd22a299855eb7327944f946053c060ff37c0384e3b1be8bc90f27a2535ff380"),
    "walker2d-full-replay-v1": (292_503_698, "c9f897563e685d90ae70dcb23534b6b96328832f4ee5a043fc253c8918a52403"),
    "walker2d-medium-expert-v1": (300_621_097, "f16bc00b6905f08d096a2b235f1c7ba73389db4f04e968a622c8ad11492fcf2f"),
    "halfcheetah-random-v1": (152_241_884, "4178873b1d3adf4fc45c8de2599a9c28695d7697d9e73c0f3fb6715f93a21c90"),
    "halfcheetah-medium-v1": (153_775_441, "2fded5b217390f7992e4d5052961cb9a6e027e8f2e2a29dd4ab234eb4b205130"),
    "halfcheetah-expert-v1": (154_077_632, "7e9893114c02d82a9ca2067e3805e4037e06b57bffeac6ac2018459f1490de8d"),
    "halfcheetah-medium-replay-v1": (60_486_703, "c38d04f1dabd9969e7a9abff12f69280cb68c8d7174bc21afe4b21e13367b242"),
    "halfcheetah-full-replay-v1": (298_849_447, "cdb723414b8498a970e590e76b097a408ef1e00838c297e24215f7ca9f077ded"),
    "halfcheetah-medium-expert-v1": (307_235_270, "89ce3c99ae0b4bdd547e4f7cd0ad318c36b3765b6b83de57a44436c7c1c61cdc"),
    "ant-random-v1": (236_118_204, "ed384d3a8cc664bbb7bcabd94a8d07adeb0f7e5ac7f8e6344279766083f64642"),
    "ant-medium-v1": (233_194_763, "f2d35a447767b3601b5809d7eb175f4ebefa531d5a22482653836e7cc06e20a3"),
    "ant-expert-v1": (231_441_892, "006b2620534f24eca76234577ca694504639baab05466fb2945d2b7edd6b28bc"),
    "ant-medium-replay-v1": (138_469_125, "3acab13873f7c51b8fb7ab1f3024ff0deffa0f0b49db31805b1391ced79b922d"),
    "ant-full-replay-v1": (458_829_203, "8be5a4f2c38e1fe30780b7b136ed2250a4ba11aef4d099b5df4aa02512ca4593"),
    "ant-medium-expert-v1": (463_733_878, "ece90130bf12d34fa881ae315ad4a201a18b127f990fc84772ffd23e684fd359"),
    "hopper-random-v2": (152_525_345, "63103ef7059db4c0819bd054f4e83ff339030b50bcdb46bdbe50385f234b5054"),
    "hopper-medium-v2": (152_756_557, "5bdf1bc4a713c82941de44633df669b36c89850b652a25985166796d25cf71a0"),
    "hopper-expert-v2": (152_427_435, "01aa219a5f8eea5e639eccdc636ec2bf40e317159a95cf4bf6e985f16909941b"),
    "hopper-medium-replay-v2": (75_854_457, "e121c5f7c9857a307baa9edc6a2c3b48e85fedb9ac316ecddd0f48ca7ef4e39b"),
    "hopper-full-replay-v2": (187_998_921, "56baf95963c51c1e964049a974566c50ba80f289390565523e60c0ba83e0982e"),
    "hopper-medium-expert-v2": (304_537_315, "9d51ad87f8c905be3880d84c6140bcdb7fbf39a19e046a237f238ba34fec9e26"),
    "walker2d-random-v2": (216_109_364, "4e863bb6090cf4a461548bd470564b32f1ae5b32ef3085f816b2ede7f092e7fa"),
    "walker2d-medium-v2": (232_254_996, "cf00f43add04c17fdfc2958dd581dea0851b2e5bedbe6fda073758a8f841aeda"),
    "walker2d-expert-v2": (230_567_195, "2985dc3d436a8baa10e8f43f946fe1d7c6337a4e4fbc65def70618093b18c59a"),
    "walker2d-medium-replay-v2": (86_323_963, "e75de96a4f77acf7d4e0d6fdf0d7ccb177c26c44bb4388e4fd99f543ccfa18db"),
    "walker2d-full-replay-v2": (285_115_514, "f2720f9d27b2acef6ec9a7d9ad3b80b6c2078ad4467cee668a81e3b3c80bcf2a"),
    "walker2d-medium-expert-v2": (462_197_079, "6b8d7f868c45bbaedf460be797fb7271b46dee6ebe45fe7a64319f2005b59a04"),
    "halfcheetah-random-v2": (237_338_037, "25407aef85b5d16c0f36b4149341edb4acc6a9e88c1db529b2de19e7464874ba"),
    "halfcheetah-medium-v2": (237_727_262, "41324e8487a9556d8cfa4538827f8937f4d63dae3030825ebc9f3a726ed08ca0"),
    "halfcheetah-expert-v2": (237_464_597, "d9fe53bb994eb1e20a99b4fa3412cd76a1bb7966a7ff55e0fcbdd6081bd2965f"),
    "halfcheetah-medium-replay-v2": (59_448_533, "48d494a4770c11f48260736dec090b78bdca8375647ed4d24bfa5b6610c7f683"),
    "halfcheetah-full-replay-v2": (291_381_762, "27fdf7ea86e5a2cbd24d611ae9e703c86ec2e8e52823abc69dd9af6afb3a36c0"),
    "halfcheetah-medium-expert-v2": (474_567_252, "015db75dae5bbe8e94029b71fa0bafc2073365df0c94744e71031189f3f79c06"),
    "ant-random-v2": (384_466_831, "93cc10893eed2b8e17f81d1aa51dc23d27c5ca101a3804249f6bd038c6f06055"),
    "ant-medium-v2": (376_239_825, "461c03b9f70f40d66b47608a92965e4ef3642bd9cdb1320d10acc92754167137"),
    "ant-expert-v2": (373_231_677, "fa22531ca79ea051006fa48bb652120d2e12c813919c530369a03c2688311b0f"),
    "ant-medium-replay-v2": (136_482_252, "844c4e5743ef51091f2106a3570b257fb149032c4743f8a5f02f40adc3b42a46"),
    "ant-full-replay-v2": (449_390_167, "b95b0a7f34b1d5d1bedfded0f8e9cfc508b59de83cd4cbfb65b18dbd5056f26c"),
    "ant-medium-expert-v2": (748_335_217, "8cfb64e62d8944b5d9dada5f0cfc13a295fafe0c6ba58b778e32ebf16c95aef1"),
    "pen-human-v1": (2_040_573, "209e345b2150b633f30a11612612c60f49e941f127ce6c4dc0cd790501c46f9f"),
    "pen-expert-v1": (262_040_663, "3791b8ca6a802061770af2977c051ac3ae261488210ce73788760a5b8308f374"),
    "pen-cloned-v1": (155_074_191, "6d1a982cee1950501bedebbddedbcbb377e6284d379986c83abac8a6c0be0c22"),
    "hammer-human-v1": (5_606_475, "3e42f3f49b5c92a901601dfe867c6c62a9651cbe79f6760ec8b402a15816a498"),
    "hammer-expert-v1": (557_047_483, "1c069a0f6e4852493023c77dc3b3a12d8d5ac2e3a034827fea3ab8a161e7185f"),
    "hammer-cloned-v1": (446_616_879, "e48d75b159bdd72f51d3f01448d3eca4d38275714e11e995c14a36f6cf159db3"),
    "door-human-v1": (3_121_206, "f9691288c3ddf2b4e7b31bdae0d8444b80ba035515495f8a902d60c43ee09370"),
    "door-expert-v1": (536_056_678, "66df4cd4e0a1e0b72ea72653ce088e29ecbfa99bac3cd2b52e64092e9a0aaab4"),
    "door-cloned-v1": (294_356_136, "1f6a60ecc4d2a2e5c02f41dd3412be61bb265a33dcf120ceee9e9682d4fe4d48"),
    "antmaze-umaze-v2": (232_532_949, "5ef15257771c50ef4d23c7de001750e96c8bb5d9b6a5e4a821dcfb3065fbd130"),
    "antmaze-umaze-diverse-v2": (230_854_272, "c771dd63963cd7d9f55f24a6d809064f6b82250a6aeac4c9d13f9a1d06e8c932"),
    "antmaze-medium-play-v2": (231_110_764, "c9fec1c1daad97c71d61bd47f4ccc9f74faa855b8a2d2e8107d5378018827e5b"),
    "antmaze-medium-diverse-v2": (231_095_166, "ad9dcbac05d1f8744a7a216083f513662f43f64f28a4a5eb225e9811902dfae7"),
    "antmaze-large-play-v2": (230_880_653, "6d353df2457829925d7f9d4b0215587469908bd57478ea76f16417cfa944f471"),
    "antmaze-large-diverse-v2": (231_183_710, "84f775eb7956ea9cc766704710dc520a8ab357adc7522ade47f556f0e335e284"),
}
FILES = {name: Known(*about) for name, about in _FILES.items()}  # by D4RL's names of the datasets
